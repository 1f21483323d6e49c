"""Bearer tokens, each with its own limits: for the trunk server and for the endpoint of the OpenAI protocol."""
