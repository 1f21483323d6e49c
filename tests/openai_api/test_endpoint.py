"""The OpenAI protocol over a real socket: `splitlearn serve` with a tiny model, and what clients of it send."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.events import Message
from splitlearn.generation.tokenizer import Tokens
from tests.conftest import TinyFactory
from tests.e2e.test_cli import Refusal, refusal
from tests.support.openai_server import START_S, USED, serve

__all__ = ["refusal"]

SAID = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Air."},
    {"role": "user", "content": "Really?"},
]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS = ("full", "split")


NAMED: dict[str, Any] = {
    "name": "sky",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"colour": {"enum": ["blue", "grey"]}, "clouds": {"type": ["integer", "null"], "maximum": 9}},
        "required": ["colour", "clouds"],
        "additionalProperties": False,
    },
}


def held_to(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def url(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server is whose arms are loaded."""
    with serve(str(files.folder), tmp_path_factory.mktemp("serve")) as address:
        yield address


@pytest.fixture(scope="module")
def name(files: ModelFiles) -> str:
    return files.folder.name


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=START_S) as opened:
        yield opened


def chat(name: str, kind: str = "split", **changes: Any) -> dict[str, Any]:
    return {
        "model": f"{name}:{kind}",
        "messages": SAID,
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        **changes,
    }


def chunks(client: httpx.Client, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end as the protocol says."""
    answer = client.post(path, json={**request, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *events, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_to_a_conversation_is_that_of_transformers_own_generate(
    client: httpx.Client, files: ModelFiles, name: str, kind: str
) -> None:
    tokens = Tokens.load(files.folder, use_fast=True)
    prompt = tokens.encode(tuple(Message(**each) for each in SAID), True)  # type: ignore[arg-type]
    whole = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    ids = whole.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
    answer = client.post(CHAT, json=chat(name, kind)).raise_for_status().json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": tokens.decode(ids[len(prompt) :].tolist()),
        "refusal": None,
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 8, "total_tokens": len(prompt) + 8}
    assert answer["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["model"] == f"{name}:{kind}"
    assert (answer["timings"]["bytes_up"] > 0) == (kind == "split")


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_of_a_conversation_reuses_the_last_one_with_the_same_answer(
    client: httpx.Client, name: str, kind: str
) -> None:
    turns, kept = list(SAID), f"{name}:{kind}?flags={USED},prefix_cache"
    for seen in (False, True):
        asked = {"messages": turns, "max_tokens": 20}
        found = client.post(CHAT, json=chat(name, kind, **asked, model=kept)).raise_for_status().json()
        plain = client.post(CHAT, json=chat(name, kind, **asked, model=f"{name}:{kind}?flags={USED}")).json()
        assert found["choices"] == plain["choices"]
        assert bool(found["usage"]["prompt_tokens_details"]["cached_tokens"]) == seen
        turns += [found["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        turns[-2].pop("refusal")


def test_a_streamed_chat_has_role_first_and_the_same_text(client: httpx.Client, name: str) -> None:
    whole = client.post(CHAT, json=chat(name)).json()["choices"][0]
    first, *others = [chunk["choices"][0] for chunk in chunks(client, CHAT, chat(name))]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in others) == whole["message"]["content"]
    assert [choice["finish_reason"] for choice in others if choice["finish_reason"]] == ["length"]
    assert others[-1]["finish_reason"] == "length"


def test_the_usage_comes_last_in_a_stream_and_only_where_it_is_asked_for(client: httpx.Client, name: str) -> None:
    *others, last = chunks(client, CHAT, chat(name, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert [chunk["usage"] for chunk in others] == [None] * len(others)
    assert last["usage"]["completion_tokens"] == 8
    assert all("usage" not in chunk for chunk in chunks(client, CHAT, chat(name)))


def test_several_answers_are_those_of_their_seeds_alone(client: httpx.Client, name: str) -> None:
    drawn = chat(name, temperature=1.0, n=3, seed=5)
    together = client.post(CHAT, json=drawn).json()["choices"]
    alone = [client.post(CHAT, json={**drawn, "n": 1, "seed": 5 + at}).json()["choices"][0] for at in range(3)]
    assert [each["message"] for each in together] == [each["message"] for each in alone]
    assert [each["index"] for each in together] == [0, 1, 2]


def test_log_probabilities_are_given_in_the_forms_of_both_paths(client: httpx.Client, name: str) -> None:
    said = client.post(CHAT, json=chat(name, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert len(said) == 8
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in said)  # greedy
    streamed = chunks(client, CHAT, chat(name, logprobs=True, top_logprobs=2))
    listed = [choice["logprobs"]["content"] for each in streamed for choice in each["choices"] if choice["logprobs"]]
    assert [token["logprob"] for each in listed for token in each] == [token["logprob"] for token in said]
    asked = {"model": f"{name}:full", "prompt": "The sky", "temperature": 0, "max_tokens": 3, "logprobs": 2}
    found = client.post(COMPLETIONS, json=asked).json()["choices"][0]["logprobs"]
    assert [len(found[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_an_echo_scores_the_prompt_as_transformers_does(
    client: httpx.Client, files: ModelFiles, name: str, kind: str
) -> None:
    ids = Tokens.load(files.folder, use_fast=True).encode("The sky is blue because air", chat=False)
    whole = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = whole(torch.tensor([ids])).logits[0].log_softmax(-1)
    asked = {"model": f"{name}:{kind}", "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = client.post(COMPLETIONS, json=asked).raise_for_status().json()["choices"][0]
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    found = [float(row[token]) for row, token in zip(wanted, [*ids[1:], int(wanted[-1].argmax())], strict=True)]
    assert others == pytest.approx(found, abs=1e-4)
    assert [max(each.values()) for each in choice["logprobs"]["top_logprobs"][1:]] == pytest.approx(
        wanted.amax(-1).tolist(), abs=1e-4
    )
    assert choice["text"].startswith("The sky is blue because air")


def test_token_ids_are_a_prompt_like_their_text(client: httpx.Client, files: ModelFiles, name: str) -> None:
    ids = Tokens.load(files.folder, use_fast=True).encode("The sky is", chat=False)
    asked = {"model": f"{name}:split", "temperature": 0, "max_tokens": 5, "ignore_eos": True}
    found = [client.post(COMPLETIONS, json={**asked, "prompt": each}).json() for each in ("The sky is", ids, [ids])]
    assert len({each["choices"][0]["text"] for each in found}) == 1
    assert {each["usage"]["prompt_tokens"] for each in found} == {len(ids)}


def test_an_answer_is_held_to_a_json_schema_whole_and_streamed_by_both_arms(client: httpx.Client, name: str) -> None:
    wanted = {"type": "json_schema", "json_schema": NAMED}
    held: dict[str, Any] = {
        "response_format": wanted,
        "ignore_eos": False,
        "max_tokens": 200,
        "temperature": 1,
        "seed": 3,
    }
    found = []
    for kind in KINDS:
        (whole,) = client.post(CHAT, json=chat(name, kind, **held)).raise_for_status().json()["choices"]
        parts = [
            each["choices"][0]["delta"].get("content", "") for each in chunks(client, CHAT, chat(name, kind, **held))
        ]
        assert whole["finish_reason"] == "stop"
        found += [whole["message"]["content"], "".join(parts)]
    assert len(set(found)) == 1
    jsonschema.validate(json.loads(found[0]), NAMED["schema"])


def test_a_format_may_ask_for_any_object_or_for_nothing(client: httpx.Client, name: str) -> None:
    free = client.post(CHAT, json=chat(name, response_format={"type": "text"})).json()["choices"]
    assert free == client.post(CHAT, json=chat(name)).json()["choices"]
    any_object: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "ignore_eos": False,
        "n": 2,
        "temperature": 1,
        "seed": 1,
    }
    for choice in client.post(CHAT, json=chat(name, **any_object)).raise_for_status().json()["choices"]:
        assert choice["message"]["content"].startswith("{")


def test_flags_stand_behind_the_models_name(client: httpx.Client, name: str) -> None:
    wanted = client.post(CHAT, json=chat(name)).json()["choices"]
    assert client.post(CHAT, json=chat(name, model=f"{name}:split?flags=none")).json()["choices"] == wanted


def test_both_arms_are_listed_and_described(client: httpx.Client, name: str) -> None:
    ids = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert ids == [f"{name}:full", f"{name}:split"]
    assert client.get(f"/v1/models/{ids[1]}").json()["id"] == ids[1]
    assert set(client.get("/openapi.json").json()["paths"]) >= {"/v1/models", CHAT, COMPLETIONS, "/health"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),  # the template has none
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": NAMED}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": held_to({"type": "array", "uniqueItems": True}), "ignore_eos": False},
            "response_format",
        ),
        ({"response_format": held_to({"enum": ["x" * 70_000]}), "ignore_eos": False}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "ignore_eos"),
    ],
)
def test_tools_and_formats_that_cannot_be_had_are_refused_by_name_streamed_or_not(
    client: httpx.Client, name: str, changes: dict[str, Any], param: str
) -> None:
    for streamed in (False, True):
        answer = client.post(CHAT, json=chat(name, **{"stream": streamed, **changes}))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
        assert error["param"].split(".")[: param.count(".") + 1] == param.split(".")
        assert error["message"]
    assert client.post(CHAT, json=chat(name)).status_code == 200


@pytest.mark.parametrize("prompts", [["The sky", "Why"], [[5, 6, 7], [8]]], ids=["texts", "token ids"])
def test_several_prompts_are_answered_in_turn(client: httpx.Client, name: str, prompts: list[Any]) -> None:
    asked = {"model": f"{name}:split", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    alone = [client.post(COMPLETIONS, json={**asked, "prompt": prompt}).json() for prompt in prompts]
    answer = client.post(COMPLETIONS, json={**asked, "prompt": prompts}).json()
    assert [choice["text"] for choice in answer["choices"]] == [each["choices"][0]["text"] for each in alone]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["total_tokens"] == sum(each["usage"]["total_tokens"] for each in alone)
    refusals: list[dict[str, Any]] = [{"stream": True}, {"prompt": []}, {"prompt": ["x"] * 33}, {"prompt": [[], [5]]}]
    for bad in refusals:
        refused = client.post(COMPLETIONS, json={**asked, "prompt": prompts, **bad})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_json_that_is_too_deep_to_read_is_said_to_be_that(client: httpx.Client) -> None:
    answer = client.post(CHAT, content="[" * 100_000 + "]" * 100_000, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "There was an error parsing the body")


def test_an_answer_sent_back_with_its_nulls_and_parameters_of_no_effect_change_nothing(
    client: httpx.Client, name: str
) -> None:
    wanted = client.post(CHAT, json=chat(name)).json()["choices"]
    nulls: dict[str, Any] = dict.fromkeys(("n", "stop", "seed", "stream", "logprobs", "tools", "user", "audio"))
    neutral = {"store": False, "service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "k", "metadata": {}}
    back = [{**each, "refusal": None, "name": None} for each in SAID]
    answer = client.post(CHAT, json={**chat(name), **nulls, **neutral, "messages": back})
    assert answer.json()["choices"] == wanted, answer.text


def test_a_path_is_the_same_with_a_slash_at_its_end_and_head_has_no_body(client: httpx.Client) -> None:
    listed = client.get("/v1/models")
    assert client.get("/v1/models/").json() == listed.json()
    head = client.head("/v1/models")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(listed.content)), b"")


def test_a_request_keeps_its_own_id_or_gets_one(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert re.fullmatch(r"[0-9a-f]{32}", client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_leaves_a_stream_gives_its_turn_to_the_next(client: httpx.Client, name: str, kind: str) -> None:
    endless = chat(name, kind, max_tokens=200, stream=True)
    with client.stream("POST", CHAT, json=endless) as left:
        next(left.iter_lines())
    assert client.post(CHAT, json=chat(name, kind)).status_code == 200


LOAD = ("loadtest", "--max-new-tokens", "8", "--clients", "2", "--duration", "1", "--out", "found", "--url")


@pytest.mark.parametrize("path", [(), ("--completions",)], ids=["chat", "completions"])
def test_a_load_test_counts_the_servers_tokens_and_its_times_hold_the_servers(
    path: tuple[str, ...],
    url: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main((*LOAD, f"{url}/v1", "--model", f"{name}:split", *path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    summary = found["summary"]
    assert summary["done"] == summary["offered"] > 0
    assert json.loads(Path("found/loadtest.json").read_text()) == found
    requests = pd.read_csv("found/requests.csv")
    assert (requests["tokens"] == requests["new_tokens"]).all(), "the server's usage says as many as were asked"
    assert (requests["chunks"] <= requests["tokens"]).all()
    assert (requests["ttft_s"] >= requests["server_ttft_s"]).all()
    own_e2el_s = requests["server_ttft_s"] + requests["server_tpot_s"] * (requests["tokens"] - 1)
    assert (requests["e2el_s"] >= own_e2el_s).all()
    assert set(found["asked"]["prompt_tokens"]) == set(requests["prompt_tokens"])
    assert summary["tokens"] == requests["tokens"].sum()
    assert "goodput" in Path("found/report.html").read_text(encoding="utf-8")


def test_which_arm_a_load_test_measures_is_for_the_user_to_say(
    url: str, name: str, refusal: Refusal, tmp_path: Path
) -> None:
    assert f"choose one with --model: {name}:full, {name}:split" in refusal.of(tmp_path, *LOAD, f"{url}/v1")
