"""The `openai` package for Python, as people use it, against `splitlearn serve` with a small model that calls tools."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests.support.caller import AFTER, CALLS, PLAIN, TEXT
from tests.support.openai_server import START_S

SAID: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
KINDS = ("full", "split")


@pytest.fixture(scope="module")
def url(caller_client: httpx.Client) -> str:
    return f"{str(caller_client.base_url).rstrip('/')}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", timeout=START_S, max_retries=0) as opened:
        yield opened


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> str:
    return f"caller:{request.param}"


def test_both_models_are_listed_and_found(client: OpenAI) -> None:
    ids = [f"caller:{kind}" for kind in KINDS]
    assert [each.id for each in client.models.list()] == ids
    assert [client.models.retrieve(each).id for each in ids] == ids


def test_an_answer_has_the_fields_of_its_type_and_the_timings_beside_them(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=SAID, logprobs=True, top_logprobs=2, **GREEDY)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", model, "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert [len(each.top_logprobs) for each in answer.choices[0].logprobs.content] == [2] * 6
    assert (answer.model_extra or {})["timings"]["ttft_s"] > 0
    assert answer._request_id


def test_a_stream_brings_the_whole_answer_and_its_usage(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": SAID, **GREEDY}
    wanted = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.choices[0].message.content
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "length")
    assert (last.choices, last.usage) == ([], wanted.usage)
    with client.chat.completions.stream(**asked) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        assert events.current_completion_snapshot.choices[0].message.content == "".join(deltas)
    assert "".join(deltas) == wanted.choices[0].message.content


def test_an_answer_goes_back_as_it_came_for_the_next_turn(client: OpenAI, model: str) -> None:
    first = client.chat.completions.create(model=model, messages=SAID, **GREEDY)
    said: list[Any] = [*SAID, first.choices[0].message, {"role": "user", "content": "Really?"}]
    second = client.chat.completions.create(model=model, messages=said, **GREEDY)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_a_completion_is_the_same_whole_and_streamed_and_scores_its_prompt(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "The sky is", **GREEDY}
    whole = client.completions.create(**asked)
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked)) == (
        whole.choices[0].text
    )
    scored = client.completions.create(echo=True, logprobs=1, **asked).choices[0]
    assert scored.text == f"The sky is{whole.choices[0].text}"
    assert scored.logprobs is not None and scored.logprobs.token_logprobs is not None
    first, *others = scored.logprobs.token_logprobs
    assert first is None and all(each <= 0 for each in others)


def test_a_tool_is_called_and_its_results_are_answered(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "temperature": 0, "tools": TOOLS}
    with client.chat.completions.stream(messages=SAID, **asked) as events:
        message = events.get_final_completion().choices[0].message
    assert message.content == TEXT
    calls = message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [*CALLS]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "blue"} for call in calls]
    said: list[Any] = [*SAID, message, *results]
    assert client.chat.completions.create(messages=said, **asked).choices[0].message.content == AFTER


def test_an_answer_is_parsed_into_the_class_that_it_was_asked_for(client: OpenAI, model: str) -> None:
    class Colour(BaseModel):
        place: Literal["sky", "sea"]
        blue: bool

    asked: Any = {"model": model, "messages": SAID, "temperature": 0, "response_format": Colour}
    found = client.chat.completions.parse(**asked).choices[0].message
    assert found.parsed == Colour.model_validate_json(found.content or "")


def test_a_response_is_the_same_whole_and_streamed(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "input": "Why is the sky blue?", "temperature": 0, "store": False}
    assert client.responses.create(**asked).output_text == PLAIN
    with client.responses.stream(**asked) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert events.get_final_response().output_text == "".join(deltas) == PLAIN


def test_failures_are_the_packages_own_exceptions(client: OpenAI, model: str, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=SAID)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=SAID, store=True)
    assert refused.value.param == "store"
    with pytest.raises(openai.NotFoundError, match="did you mean /v1/chat/completions"):
        OpenAI(base_url=url.removesuffix("/v1"), api_key="none").chat.completions.create(model=model, messages=SAID)


def test_requests_at_once_get_the_answers_that_they_get_alone(client: OpenAI, model: str, url: str) -> None:
    texts = ["One", "Two is", "Three is a"]
    alone = [client.completions.create(model=model, prompt=text, **GREEDY).choices[0].text for text in texts]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=START_S, max_retries=0) as many:
            asked = [many.completions.create(model=model, prompt=text, **GREEDY) for text in texts]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == alone


def test_a_stream_that_is_left_leaves_the_server_free(client: OpenAI, model: str) -> None:
    endless: dict[str, Any] = {**GREEDY, "max_tokens": 200}
    with client.chat.completions.create(model=model, messages=SAID, stream=True, **endless) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model=model, messages=SAID, **GREEDY).choices


def test_the_time_that_is_waited_for_an_answer_is_the_clients_own(client: OpenAI, model: str) -> None:
    impatient = client.with_options(timeout=openai.Timeout(START_S, read=0.001))
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=model, messages=SAID, **{**GREEDY, "max_tokens": 200})
    assert client.chat.completions.create(model=model, messages=SAID, **GREEDY).choices
