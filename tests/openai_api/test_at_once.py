"""Many requests at once on one endpoint: each gets its answer alone, batch ones keep nobody waiting, deadlines hold."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

from splitlearn.checkpoints.folder import ModelFiles
from tests.openai_api.test_endpoint import CHAT, KINDS, chat
from tests.support.openai_server import START_S, serve
from tests.support.tiny import make_hostile
from tests.support.trunk import eventually

SHARE = 0.2
"""Of the trunk's answers to these clients, those that are computed again."""
CLIENTS, RUNNING, WAITING, LONG, MANY = 16, 8, 8, 400, 80
POLL_S = 0.1
WORDS = [
    "The",
    "sky",
    "is",
    "blue",
    "because",
    "air",
    "scatters",
    "short",
    "waves",
    "of",
    "light",
    "more",
    "than",
    "long",
    "ones",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_hostile(tmp_path_factory.mktemp("tiny") / "hostile")


@pytest.fixture(scope="module")
def url(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    limits = {"max_running": RUNNING, "max_waiting": WAITING}
    with serve(str(files.folder), tmp_path_factory.mktemp("serve"), api=limits, trunk={"verify": SHARE}) as address:
        yield address


@pytest.fixture(scope="module")
def name(files: ModelFiles) -> str:
    return files.folder.name


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=START_S, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


def asked(name: str, kind: str, number: int) -> dict[str, Any]:
    """A request of its own length, for an answer of its own length."""
    words = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(1 + 5 * number))
    messages = [{"role": "user", "content": words}]
    return chat(name, kind, messages=messages, max_tokens=4 + 7 * number % 31, repetition_penalty=1.5)


def said(client: httpx.Client, request: dict[str, Any], leaves_after: int | None = None) -> str:
    """The text that a client sees, which may leave after some chunks."""
    seen = ""
    with client.stream("POST", CHAT, json={**request, "stream": True}) as answer:
        assert answer.status_code == 200
        for count, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            seen += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            if count == leaves_after:
                break
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_sixteen_clients_is_the_answer_alone(client: httpx.Client, name: str, kind: str) -> None:
    requests = [asked(name, kind, number) for number in range(CLIENTS)]
    alone = [said(client, request) for request in requests]
    leaving = [3 if number % 4 == 3 else None for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        found = list(threads.map(partial(said, client), requests, leaving))
    for own, seen, left in zip(alone, found, leaving, strict=True):
        assert seen == own if left is None else own.startswith(seen)


def test_answers_at_once_are_spot_checked_each_in_its_own_session(client: httpx.Client, name: str) -> None:
    def ask(number: int) -> Any:
        asked = chat(name, messages=[{"role": "user", "content": f"Say the number {number}."}], max_tokens=40)
        return client.post(CHAT, json=asked).raise_for_status().json()["timings"].get("spot_checks")

    with ThreadPoolExecutor(4) as threads:
        found = [each for each in threads.map(ask, range(8)) if each]
    assert sum(each["checked"] for each in found) == pytest.approx(8 * 40 * SHARE, abs=1)
    assert not any(each["mismatches"] for each in found)


def test_others_are_answered_while_the_chat_template_computes_without_end(client: httpx.Client, name: str) -> None:
    def refusal(word: str) -> str:
        answer = client.post(CHAT, json=chat(name, messages=[{"role": "user", "content": word}]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        return str(answer.json()["error"]["message"])

    request = asked(name, "split", 2)
    alone = said(client, request)
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(refusal, word) for word in ("PRODUCTS", "HOARD")]
        for _ in range(3):
            assert said(client, request) == alone
            assert not all(end.done() for end in ends)
    assert "5 s of CPU time" in ends[0].result() and "256 MiB of memory" in ends[1].result()


def test_no_interactive_request_waits_for_batch_ones_and_their_line_is_bounded(client: httpx.Client, name: str) -> None:
    long = chat(name, "split", max_tokens=MANY)

    def batch(_: int) -> int:
        """Ask again where the probe below had the last place in the line."""
        while (status := client.post(CHAT, json=long, headers={"x-priority": "batch"}).status_code) == 429:
            time.sleep(POLL_S)
        return status

    with ThreadPoolExecutor(RUNNING + WAITING) as threads:
        ended = [threads.submit(batch, number) for number in range(RUNNING + WAITING)]
        assert eventually(lambda: _refused(client, long), START_S)
        assert client.post(CHAT, json=chat(name)).status_code == 200
        assert not all(each.done() for each in ended)
        assert {each.result() for each in ended} == {200}


def _refused(client: httpx.Client, request: dict[str, Any]) -> bool:
    """Whether a batch request is refused since too many wait."""
    headers = {"x-priority": "batch", "x-deadline-s": "0.001"}
    answer = client.post(CHAT, json=request, headers=headers)
    return answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_takes_longer_than_its_deadline_ends_with_an_error(
    client: httpx.Client, name: str, kind: str
) -> None:
    long, soon = chat(name, kind, max_tokens=LONG), {"x-deadline-s": "0.2"}
    whole = client.post(CHAT, json=long, headers=soon)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert whole.headers["x-should-retry"] == "false"
    streamed = client.post(CHAT, json={**long, "stream": True}, headers=soon)
    assert "deadline_exceeded" in streamed.text and "[DONE]" not in streamed.text


@pytest.mark.parametrize(("header", "value"), [("x-priority", "soon"), ("x-deadline-s", "0"), ("x-deadline-s", "nan")])
def test_what_no_header_can_say_is_refused_by_its_name(
    client: httpx.Client, name: str, header: str, value: str
) -> None:
    answer = client.post(CHAT, json=chat(name), headers={header: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, header)
