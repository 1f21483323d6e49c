"""Tools on the endpoint: a model that calls them, through both arms, as clients of the protocol see it."""

import json
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.caller import AFTER, CALLS, PLAIN, TEXT

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "What colour is it?"}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


@pytest.fixture
def client(caller_client: httpx.Client) -> httpx.Client:
    return caller_client


def request(kind: str = "split", **changes: Any) -> dict[str, Any]:
    return {"model": f"caller:{kind}", "messages": [USER], "tools": [LOOK], "temperature": 0, **changes}


def whole(client: httpx.Client, asked: dict[str, Any]) -> ChatCompletion:
    """The answer, which must be what the protocol's own types say, nothing coerced."""
    answer = client.post(CHAT, json=asked)
    assert answer.status_code == 200, answer.text
    return ChatCompletion.model_validate_json(answer.text, strict=True)


def streamed(client: httpx.Client, asked: dict[str, Any]) -> list[ChatCompletionChunk]:
    answer = client.post(CHAT, json={**asked, "stream": True})
    *chunks, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(chunk, strict=True) for chunk in chunks]


def called(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


@pytest.mark.parametrize("kind", ["full", "split"])
def test_calls_are_in_the_message_and_their_text_is_not(client: httpx.Client, kind: str) -> None:
    choice = whole(client, request(kind)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == TEXT
    assert called(choice.message) == list(CALLS)
    assert len({call.id for call in choice.message.tool_calls or ()}) == len(CALLS)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stream_has_the_same_text_and_calls_with_their_numbers(client: httpx.Client, samples: int) -> None:
    for sample in range(samples):
        chunks = streamed(client, request(n=samples, temperature=0 if samples == 1 else 0.01, logprobs=True))
        choices = [each for chunk in chunks for each in chunk.choices if each.index == sample]
        assert "".join(each.delta.content or "" for each in choices) == TEXT
        calls = [call for each in choices for call in each.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1]
        assert [(each.function and (each.function.name, each.function.arguments)) for each in calls] == list(CALLS)
        assert len({call.id for call in calls}) == len(calls)
        assert [each.finish_reason for each in choices if each.finish_reason] == ["tool_calls"]


@pytest.mark.parametrize("kind", ["full", "split"])
def test_the_answer_as_it_came_and_the_tools_results_continue_the_conversation(client: httpx.Client, kind: str) -> None:
    message = client.post(CHAT, json=request(kind)).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": each["id"], "content": "blue"} for each in message["tool_calls"]]
    for more in ({}, {"tools": None}):
        choice = whole(client, request(kind, messages=[USER, message, *results], **more)).choices[0]
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (AFTER, "stop", None)


def test_without_tools_or_with_the_choice_none_there_are_no_calls(client: httpx.Client) -> None:
    for changes in ({"tools": None}, {"tool_choice": "none"}):
        choice = whole(client, request(**changes)).choices[0]
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (PLAIN, "stop", None)


def test_without_parallel_calls_the_first_one_ends_the_answer(client: httpx.Client) -> None:
    answer = whole(client, request(parallel_tool_calls=False))
    assert called(answer.choices[0].message) == [CALLS[0]]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage and answer.usage.completion_tokens == 5


LISTEN = {
    "type": "function",
    "function": {
        "name": "listen",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["sky", "sea"]}, "loud": {"type": "boolean"}},
            "required": ["place", "loud"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("kind", ["full", "split"])
def test_where_a_call_is_required_the_answer_is_one_whose_arguments_follow_the_schema(
    client: httpx.Client, kind: str
) -> None:
    named = {"type": "function", "function": {"name": "listen"}}
    for tools, choice in (([LISTEN], "required"), ([LOOK, LISTEN], named)):
        for draw in ({"temperature": 0}, {"temperature": 50, "seed": 3}):  # so hot that anything could come
            answer = whole(client, request(kind, tools=tools, tool_choice=choice, **draw)).choices[0]
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            ((name, arguments),) = called(answer.message)
            told = json.loads(arguments)
            assert name == "listen" and set(told) == {"place", "loud"}
            assert told["place"] in ("sky", "sea") and isinstance(told["loud"], bool)


def test_a_call_that_the_limit_cuts_off_is_text(client: httpx.Client) -> None:
    choice = whole(client, request(max_tokens=3)).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert (choice.message.content or "").startswith(TEXT)
    assert "tool_call" not in (choice.message.content or "")


TOOL = {"role": "tool", "content": "blue", "tool_call_id": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
FUNCTION = LOOK["function"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{**LOOK, "function": {**FUNCTION, "strict": True}}]}, "tools"),  # type: ignore[dict-item]
        ({"tools": [{**LOOK, "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "listen"}}}, "tool_choice"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {"tool_choice": "required", "tools": [{**LOOK, "function": {"name": "a", "parameters": {"not": {}}}}]},
            "tools",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [USER, TOOL]}, "messages"),
        ({"messages": [{**USER, "tool_call_id": "a"}]}, "messages.0"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages.1"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{"}}]},
                ]
            },
            "messages",
        ),
    ],
)
def test_what_is_no_tool_and_no_call_is_refused_by_its_name(
    client: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    answer = client.post(CHAT, content=json.dumps(request(**changes)), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] == param or error["param"].startswith(f"{param}.")
