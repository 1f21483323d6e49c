"""/v1/responses through both arms, judged by the protocol's own types."""

import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from splitlearn.events import TokenEvent
from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.responses.request import ResponseRequest
from splitlearn.openai_api.responses.writer import ResponseWriter
from tests.support.caller import AFTER, CALLS, PLAIN, TEXT

PATH = "/v1/responses"
ASK = "What colour is it?"
LOOK = {
    "type": "function",
    "name": "look",
    "description": "Looks at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def client(caller_client: httpx.Client) -> httpx.Client:
    return caller_client


def request(kind: str = "split", **changes: Any) -> dict[str, Any]:
    return {"model": f"caller:{kind}", "input": ASK, "temperature": 0, **changes}


def whole(client: httpx.Client, asked: dict[str, Any]) -> Response:
    """The response, which must be what the protocol's own types say, nothing coerced."""
    answer = client.post(PATH, json=asked)
    assert answer.status_code == 200, answer.text
    return Response.model_validate_json(answer.text, strict=True)


def streamed(client: httpx.Client, asked: dict[str, Any]) -> list[Any]:
    """The events, numbered from 0, each named by its type."""
    answer = client.post(PATH, json={**asked, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        events.append(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def facts(response: Response) -> Any:
    """All but what is of one answer alone: ids, times."""
    own = {"id", "created_at", "completed_at", "timings"}
    output = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
    return response.model_dump(exclude={*own, "output"}), output


@pytest.mark.parametrize("kind", ["full", "split"])
def test_a_text_is_answered_by_a_message(client: httpx.Client, kind: str) -> None:
    response = whole(client, request(kind, metadata={"a": "b"}, max_output_tokens=9))
    assert (response.output_text, response.status, response.error) == (PLAIN, "completed", None)
    assert [item.type for item in response.output] == ["message"]
    assert response.usage and response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.metadata, response.max_output_tokens) == ({"a": "b"}, 9)
    kept: Any = response.model_dump()
    assert kept["store"] is False and kept["timings"]["ttft_s"] > 0


def test_calls_are_items_and_as_they_came_with_their_results_they_continue_the_conversation(
    client: httpx.Client,
) -> None:
    first = whole(client, request(tools=[LOOK]))
    assert [item.type for item in first.output] == ["message", "function_call", "function_call"]
    calls = [item for item in first.output if item.type == "function_call"]
    assert first.output_text == TEXT
    assert [(call.name, call.arguments) for call in calls] == list(CALLS)
    assert len({item.id for item in first.output} | {call.call_id for call in calls}) == 5
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "blue"} for call in calls]
    back = [item.model_dump(mode="json", by_alias=True) for item in first.output]
    said = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}, *back, *results]
    assert whole(client, request(tools=[LOOK], input=said)).output_text == AFTER


@pytest.mark.parametrize(
    "changes",
    [{}, {"tools": [LOOK]}, {"tools": [LOOK], "parallel_tool_calls": False}, {"tools": [LOOK], "max_output_tokens": 3}],
)
def test_the_events_build_up_the_response_that_comes_whole(client: httpx.Client, changes: dict[str, Any]) -> None:
    created, begun, *events, last = streamed(client, request(**changes))
    wanted = whole(client, request(**changes))
    assert (created.type, begun.type) == ("response.created", "response.in_progress")
    assert (created.response.status, created.response.output) == ("in_progress", [])
    assert last.type == ("response.incomplete" if "max_output_tokens" in changes else "response.completed")
    assert facts(last.response) == facts(wanted)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    for at, item in enumerate(done):
        own = [event for event in events if event.output_index == at]
        kinds = [event.type.removeprefix("response.") for event in own]
        if item.type == "message":
            deltas = kinds.count("output_text.delta")
            closing = ["output_text.done", "content_part.done", "output_item.done"]
            assert kinds == ["output_item.added", "content_part.added", *["output_text.delta"] * deltas, *closing]
            assert "".join(event.delta for event in own if event.type.endswith("text.delta")) == item.content[0].text
        else:
            arguments = [f"function_call_arguments.{each}" for each in ("delta", "done")]
            assert kinds == ["output_item.added", *arguments, "output_item.done"]
            assert own[1].delta == own[2].arguments == item.arguments


def test_a_tool_that_must_be_called_is(client: httpx.Client) -> None:
    place = {"type": "object", "properties": {"place": {"const": "sea"}}, "required": ["place"]}
    listen = {"type": "function", "name": "listen", "parameters": {**place, "additionalProperties": False}}
    chosen = {"type": "function", "name": "listen"}
    response = whole(client, request(tools=[LOOK, listen], tool_choice=chosen))
    (call,) = response.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"place": "sea"}
    assert json.loads(response.model_dump_json())["tool_choice"] == chosen


def test_an_answer_that_the_limit_cuts_off_is_incomplete(client: httpx.Client) -> None:
    response = whole(client, request(tools=[LOOK], max_output_tokens=1))
    assert response.status == "incomplete" and response.output_text == TEXT
    assert response.incomplete_details and response.incomplete_details.reason == "max_output_tokens"


def test_a_text_format_holds_the_answer_to_its_schema(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["blue"]}}, "required": ["colour"]}
    form = {"type": "json_schema", "name": "sky", "schema": {**schema, "additionalProperties": False}}
    response = whole(client, request(text={"format": form}))
    assert json.loads(response.output_text) == {"colour": "blue"}
    assert response.text and response.text.model_dump(by_alias=True, exclude_none=True)["format"] == form


def test_a_failure_in_the_middle_is_the_last_event_with_what_came_before() -> None:
    asked = ResponseRequest.model_validate(request())
    writer = ResponseWriter(asked, asked.request())
    events = [*writer.first(), *writer.chunks(TokenEvent((1,), "Blue", 0.1, {}))]
    (last,) = writer.failure(ApiError(503, "The trunk is lost."))
    assert last["sequence_number"] == len(events)
    response = EVENT.validate_json(json.dumps(last), strict=True).response
    assert (response.status, response.output_text) == ("failed", "Blue")
    assert (response.error.code, response.error.message) == ("server_error", "The trunk is lost.")


def test_instructions_are_a_system_message_and_a_text_is_a_users(client: httpx.Client) -> None:
    items = [{"role": "developer", "content": "Be short."}, {"type": "message", "role": "user", "content": ASK}]
    one, other = whole(client, request(instructions="Be short.")), whole(client, request(input=items))
    assert one.usage and other.usage and one.usage.input_tokens == other.usage.input_tokens
    assert (one.instructions, other.instructions) == ("Be short.", None)


CALL = {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"input": []}, "input"),
        ({"input": " "}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input"),
        ({"input": [ASK]}, "input.0"),
        ({"input": [{"role": "user", "content": ASK}, {**CALL, "arguments": "["}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [LOOK]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),  # of no tools
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"model": "caller:half"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(client: httpx.Client, changes: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        asked = json.dumps(request(**changes, stream=stream))
        answer = client.post(PATH, content=asked, headers={"Content-Type": "application/json"})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (404 if param == "model" else 400, "invalid_request_error"), error
        assert error["param"] == param or error["param"].startswith(f"{param}."), error
        assert error["message"].startswith(error["param"])
