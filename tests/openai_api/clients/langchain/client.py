"""What langchain-openai gets: python client.py URL MODEL, JSON on stdout."""

import json
import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
asked = {"base_url": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 12, "max_retries": 0}
chat = ChatOpenAI(**asked, stream_usage=True)
said = [HumanMessage("Why is the sky blue?")]

whole = chat.invoke(said)
chunks = list(chat.stream(said))
usage = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
try:
    ChatOpenAI(**{**asked, "model": "gpt-4o"}).invoke(said)
    failure = 200
except openai.APIStatusError as error:
    failure = error.status_code

print(
    json.dumps(
        {
            "whole": whole.content,
            "streamed": "".join(chunk.content for chunk in chunks),
            "usage": [usage["input_tokens"], usage["output_tokens"]],
            "next": chat.invoke([*said, whole, HumanMessage("Really?")]).content,
            "several": [each.content for each in chat.batch(["Why is the sky blue?", "Why is the sky blue?"])],
            "completion": OpenAI(**asked).invoke("The sky is"),
            "completions": OpenAI(**asked).batch(["The sky is", "The sky is"]),
            "failure": failure,
        }
    )
)
