"""The trunk's protocol: trunk.proto, its generated code (`make proto`), tensors as bytes, errors as statuses."""

PROTOCOL = 5
SERVICE = "splitlearn.v1.Trunk"
# A message stays below gRPC's default limit of 4 MiB, which any client or proxy passes; longer prompts go in parts.
MAX_TENSOR_BYTES = 2 * 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
# What may stand around a tensor's data in a message.
ENVELOPE_BYTES = 256
# A trunk server says this on stdout, followed by host:port, when it is ready.
READY = "trunk server listening on "
# The metadata by which a client shows its token.
TOKEN_HEADER = "authorization"
TOKEN_SCHEME = "Bearer "
