"""The OpenAI protocol over both arms: any client of it talks to the full model and to the split one.

`requests.py` has what can be asked and what that is in this program's words, `messages.py` the same of a conversation
with its tools, `writer.py` what is answered, `streaming.py` how it is sent on its way, `responses/` is /v1/responses,
`queue.py` which requests run and which wait, `wishes.py` what their headers wish of it, `answers.py` the runs behind
them, `failures.py` the protocol's errors, `app.py` the paths. docs/openai-api.md explains them.
"""
