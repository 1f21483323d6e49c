"""Clients that other people made against a live `splitlearn serve`, by make test-clients (docs/clients.md).

`NOT_PASSED` are the checks of the provider check that do not pass, each with the reason.
"""

import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from splitlearn.checkpoints.folder import ModelFiles
from tests.conftest import TinyFactory
from tests.openai_api.clients import environments
from tests.support.openai_server import START_S, serve
from tests.support.page import CHROMIUM, chromium

pytestmark = [pytest.mark.clients, pytest.mark.weights, pytest.mark.timeout(1800)]  # the first run installs

KINDS = ("full", "split")
SAID = {"role": "user", "content": "Why is the sky blue?"}
TOOLS = "the default model's chat template has no place for tools"
PONG = "chat.pong"
CANARY_CHECKS = 7
NOT_PASSED = {
    PONG: "asked at a temperature of 1, a model of 135M parameters does not always say pong",
    "catalog.declared-v2": "no catalog of prices is published",
    "chat.forwarded-fields": "thinking, reasoning and reasoning_effort are refused by name, not ignored",
    "tools.parallel-deltas": TOOLS,
    "tools.round-trip": TOOLS,
}


@pytest.fixture(scope="module")
def url(default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(str(default_model.folder), tmp_path_factory.mktemp("serve")) as address:
        yield f"{address}/v1"


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, default_model: ModelFiles) -> str:
    return f"{default_model.folder.name}:{request.param}"


def answered(url: str, path: str, **asked: Any) -> dict[str, Any]:
    request = {"temperature": 0, "max_tokens": 12, **asked}
    found: dict[str, Any] = httpx.post(f"{url}/{path}", json=request, timeout=START_S).raise_for_status().json()
    return found


def wanted(url: str, model: str) -> dict[str, Any]:
    """What each client must get."""
    first = answered(url, "chat/completions", model=model, messages=[SAID])
    message = first["choices"][0]["message"]
    said = [SAID, message, {"role": "user", "content": "Really?"}]
    following = answered(url, "chat/completions", model=model, messages=said)
    continued = answered(url, "completions", model=model, prompt="The sky is")["choices"][0]["text"]
    name = model.partition(":")[0]
    return {
        "models": [f"{name}:{kind}" for kind in KINDS],
        "whole": message["content"],
        "streamed": message["content"],
        "usage": [first["usage"]["prompt_tokens"], first["usage"]["completion_tokens"]],
        "next": following["choices"][0]["message"]["content"],
        "several": [message["content"]] * 2,
        "completion": continued,
        "completions": [continued] * 2,
        "failure": 404,
    }


def check(found: dict[str, Any], url: str, model: str) -> None:
    expected = wanted(url, model)
    assert found == {key: expected[key] for key in found}


def test_the_openai_package_of_npm_gets_the_endpoints_answers(url: str, model: str) -> None:
    folder = environments.node("openai_npm").parents[1]
    check(json.loads(environments.run(["node", "client.mjs", url, model], folder)), url, model)


def test_the_ai_sdk_gets_the_endpoints_answers(url: str, model: str) -> None:
    folder = environments.node("ai_sdk").parents[1]
    check(json.loads(environments.run(["node", "client.mjs", url, model], folder)), url, model)


def test_langchain_gets_the_endpoints_answers(url: str, model: str) -> None:
    python = environments.python("langchain") / "python"
    script = environments.HERE / "langchain" / "client.py"
    check(json.loads(environments.run([python, script, url, model])), url, model)


@pytest.mark.parametrize("kind", KINDS)
def test_each_check_of_compatcanary_passes_with_a_model_that_calls_tools(
    caller_client: httpx.Client, kind: str
) -> None:
    program, url = environments.node("compatcanary") / "compatcanary", f"{str(caller_client.base_url).rstrip('/')}/v1"
    command = [str(program), "scan", "--format", "json", "--fail-on", "never", "--base-url", url]
    found = json.loads(environments.run([*command, "--model", f"caller:{kind}"]))["results"]
    assert [each["status"] for each in found] == ["pass"] * CANARY_CHECKS, found


def test_each_check_of_the_provider_check_passes_that_applies(url: str, model: str, tmp_path: Path) -> None:
    program, report = environments.python("provider_check") / "trustedrouter-provider-check", tmp_path / "report.json"
    command = [str(program), "--base-url", url, "--model", model, "--tier", "5", "--json", str(report)]
    subprocess.run(command, capture_output=True, timeout=environments.END_S)  # its status is 1 without a pong
    checks = json.loads(report.read_text(encoding="utf-8"))["checks"]
    failed = {each["id"] for each in checks if each["status"] != "pass"}
    assert failed - {PONG} == {*NOT_PASSED} - {PONG}, checks


def test_an_evaluation_gives_both_arms_the_same_score_and_transformers_own_log_likelihoods(
    url: str, default_model: ModelFiles, tmp_path: Path
) -> None:
    found = [evaluated(url, default_model, kind, tmp_path / kind) for kind in KINDS]
    assert found[0][0] == found[1][0]
    scores = transformers_scores(default_model, [key for key, _ in found[0][1]])
    for _, scored in found:
        for (_, score), own in zip(scored, scores, strict=True):
            assert math.isclose(score, own, abs_tol=1e-4)


def evaluated(
    url: str, files: ModelFiles, kind: str, folder: Path
) -> tuple[float, list[tuple[tuple[str, str], float]]]:
    """The accuracy, and the log likelihood of each answer behind its question."""
    options = {"model": f"{files.folder.name}:{kind}", "base_url": f"{url}/completions", "tokenizer": files.folder}
    command = [str(environments.python("lm_eval") / "lm-eval"), "run", "--model", "local-completions", "--model_args"]
    command += [",".join(f"{key}={value}" for key, value in options.items()), "--tasks", "splitlearn_facts"]
    command += ["--include_path", str(environments.HERE / "lm_eval"), "--output_path", str(folder), "--log_samples"]
    command += ["--batch_size", "8"]  # several prompts a request
    environments.run(command, HF_HUB_OFFLINE="1")
    (result,), (samples,) = folder.rglob("results_*.json"), folder.rglob("samples_*.jsonl")
    accuracy = json.loads(result.read_text(encoding="utf-8"))["results"]["splitlearn_facts"]["acc,none"]
    scored: list[tuple[tuple[str, str], float]] = []
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        asked = [(each["arg_0"], each["arg_1"]) for each in sample["arguments"].values()]
        scored += zip(asked, (float(each[0][0]) for each in sample["resps"]), strict=True)
    return accuracy, sorted(scored)


def transformers_scores(files: ModelFiles, asked: list[tuple[str, str]]) -> list[float]:
    """The log likelihood of each second text behind its first one, by the whole model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(files.folder)
    whole = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)

    def score(before: str, after: str) -> float:
        ids, known = tokens(before + after)["input_ids"], len(tokens(before)["input_ids"])
        with torch.inference_mode():
            logprobs = whole(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logprobs[at - 1, ids[at]]) for at in range(known, len(ids)))

    return [score(*each) for each in asked]


def test_no_request_that_the_openapi_page_allows_or_forbids_is_the_servers_failure(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    program = environments.python("schemathesis") / "schemathesis"
    with serve(str(tiny_model("llama").folder), tmp_path) as address:
        command = [
            str(program),
            "run",
            f"{address}/openapi.json",
            "--checks",
            "not_a_server_error",
            "--max-examples",
            "20",
        ]
        environments.run([*command, "--phases", "examples,coverage,fuzzing", "--seed", "1"], tmp_path)


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
def test_gradios_chat_page_shows_the_answers_of_two_turns(
    url: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    chat = gradio.load_chat(f"{url}/", model=model, token="none")
    _, page_url, _ = chat.launch(prevent_thread_lock=True, quiet=True)
    with chromium() as browser, closing(chat):
        page = browser.new_page()
        page.goto(page_url)
        box, answers = page.get_by_role("textbox").first, page.locator(".bot.message")
        for turn, said in enumerate(("Say hello.", "And goodbye."), 1):
            box.fill(said)
            box.press("Enter")
            expect(answers).to_have_count(turn)
            expect(answers.last).to_have_text(re.compile(r"^(?!Loading content)\W*\w"))  # what Gradio shows before
            expect(box).to_be_enabled(timeout=START_S * 1000)  # the answer has ended
