"""What a client can send that is wrong: the right status, the parameter's name, the protocol's envelope; and a
bystander's stream goes on meanwhile as if nothing had been sent."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from splitlearn.checkpoints.folder import ModelFiles
from tests.conftest import TinyFactory
from tests.support.openai_server import START_S, serve
from tests.support.tokens import ANN, entry, written

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EVE = "secret-of-eve"
KEY = {"Authorization": f"Bearer {ANN}"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024
Send = Callable[[httpx.Client], httpx.Response]


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def client(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("bad-input")
    keys = written(
        folder,
        entry("ann", ANN, sessions=8, tokens_per_second=1e9),
        entry("eve", EVE, expires=datetime.now(UTC) - timedelta(seconds=1)),
    )
    with (
        serve(str(files.folder), folder, api={"tokens": str(keys)}) as url,
        httpx.Client(base_url=url, timeout=START_S, headers=KEY) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def model(files: ModelFiles) -> str:
    return f"{files.folder.name}:split"


class Bystander:
    """Somebody whose answers are streamed, one after the other, in a thread."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client, self._stop = client, threading.Event()
        self._asked = {"model": model, "prompt": "The sky is", "temperature": 0, "max_tokens": 64, "ignore_eos": True}
        self._alone = self._stream()
        self.answers = 0
        self.failure = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the end of the answer that is being streamed."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set() and not self.failure:
            try:
                answer = self._stream()
            except (httpx.HTTPError, ValueError, KeyError) as error:
                answer = repr(error)
            self.answers += 1
            if answer != self._alone:
                self.failure = f"{answer!r} and not {self._alone!r}"

    def _stream(self) -> str:
        with self._client.stream("POST", COMPLETIONS, json={**self._asked, "stream": True}) as stream:
            *events, last = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        if last != "[DONE]":
            raise ValueError(last)
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@pytest.fixture(scope="module")
def bystander(client: httpx.Client, model: str) -> Iterator[Bystander]:
    found = Bystander(client, model)
    yield found
    found.end()
    assert found.answers
    assert not found.failure


@pytest.fixture(autouse=True)
def _undisturbed(bystander: Bystander) -> Iterator[None]:
    yield
    assert not bystander.failure


def check(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    """Check status and envelope, and return the error. `param` may be followed by what is inside of it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    (name,) = answer.json()
    error: dict[str, Any] = answer.json()["error"]
    assert (name, set(error)) == ("error", {"message", "type", "param", "code"})
    assert error["message"] and len(error["message"]) < 2000
    found = error["param"]
    assert found == param or (param and str(found).startswith(f"{param}.")), error
    return error


Case = tuple[str, dict[str, Any]]


def bad(param: str, *values: Any) -> list[Case]:
    """A case for each of these values of a parameter."""
    return [(param, {param: value}) for value in values]


def bad_messages(param: str, part: str, *values: Any) -> list[Case]:
    """A case for each of these values of a message's part."""
    return [(param, {"messages": [{"role": "user", "content": "Hi", part: value}]}) for value in values]


NESTED: Any = json.loads("[" * 500 + "]" * 500)
LONG = "word " * 600
PARAMETERS: list[Case] = [
    *bad("temperature", "hot", [], -0.1, 1e9, True),
    *bad("top_p", 0, 1.1, "all"),
    *bad("top_k", -1, 1.5, 2**70),
    *bad("repetition_penalty", 0, -1, "x"),
    *bad("frequency_penalty", -2.1, 2.1),
    *bad("presence_penalty", -2.1, 2.1),
    *bad("seed", -1, 0.5, 2**80, "7"),
    *bad("n", 0, 17, -1, 1.5, "2", 2),  # 2: greedy answers are all the same
    *bad("stop", "", ["a"] * 17, [1], 5, {}, "\ud800"),
    *bad("max_tokens", 0, -1, 10**5, 10**12, 2.5, "8"),
    *bad("logit_bias", {"400": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"5": "x"}, [5]),
    *bad("stream", "yes", 1),
    *bad("stream_options", {"include_usage": True}),
    ("stream_options", {"stream": True, "stream_options": {"other": 1}}),
    *bad("metadata", {"a": 1}, "x"),
    *bad("user", 5),
    *bad("no_such_parameter", 1),
    *bad("model", 5, None, []),
]
ON_CHAT: list[Case] = [
    *bad("messages", [], {}, "Hi", None, ["Hi"], NESTED),
    *bad_messages("messages", "content", " \n", "", 5, [], [{"type": "x"}], "\ud800", LONG),
    *bad_messages("messages.0.role", "role", "robot", "", 5),
    *bad_messages("messages.0.no_such", "no_such", 1),
    *bad("top_logprobs", 3, "3"),  # 3: without logprobs
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
    *bad("logprobs", 2),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
]
ON_COMPLETIONS: list[Case] = [
    *bad("prompt", "", " ", [], [[]], ["a", ""], ["a"] * 1000, 5, None, {}, "a\ud800", LONG),
    *bad("prompt", [400], [-1], [2**70], [1.5], [True], [1, "a"], [5] * 600, NESTED),
    *bad("logprobs", 21, -1, True, "5"),
    ("echo", {"echo": True, "stream": True}),
]
ON_RESPONSES: list[Case] = [
    *bad("input", "", " ", [], 5, None, {}, "a\ud800", LONG, [5], [{"role": "robot", "content": "Hi"}]),
    *bad("max_output_tokens", 0, -1, 10**12, "8"),
    *bad("temperature", "hot", -0.1),
    *bad("top_p", 0, 1.1),
    *bad("stream", "yes"),
    *bad("store", True),
    *bad("previous_response_id", "resp_1"),
    *bad("no_such_parameter", 1),
]
BODIES = [
    *((RESPONSES, param, changes) for param, changes in ON_RESPONSES),
    *((CHAT, param, changes) for param, changes in (*PARAMETERS, *ON_CHAT)),
    *((COMPLETIONS, param, changes) for param, changes in (*PARAMETERS, *ON_COMPLETIONS)),
]


@pytest.mark.parametrize(("path", "param", "changes"), BODIES)
def test_a_wrong_value_of_any_parameter_is_named(
    client: httpx.Client, model: str, path: str, param: str, changes: dict[str, Any]
) -> None:
    right = {
        CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        COMPLETIONS: {"prompt": "Hi", "max_tokens": 2},
        RESPONSES: {"input": "Hi", "max_output_tokens": 2},
    }
    content = json.dumps({"model": model, "temperature": 0, **right[path], **changes})
    check(client.post(path, content=content, headers=JSON), 400, param)


DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NO_JSON = {
    "a part of an object": b"{",
    "nothing": b"",
    "words": b"model=x",
    "bytes that are no text": b'{"model": "\xff"}',
    "two objects": b"{}{}",
    "a trailing comma": b'{"model": "x",}',
    "a NUL between": b'{"model"\x00: "x"}',
    "a name that is no text": b'{"model": "x", "\\ud800": 1}',
    "lists of lists of lists": DEEP,
    "a number of 10,000 digits": b'{"model": "x", "prompt": "Hi", "seed": 1' + b"0" * 10_000 + b"}",
}


@pytest.mark.parametrize("what", NO_JSON)
def test_what_is_no_json_is_refused(client: httpx.Client, what: str) -> None:
    for path in (CHAT, COMPLETIONS, RESPONSES):
        check(client.post(path, content=NO_JSON[what], headers=JSON), 400, None)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "true", "[{}]"])
def test_json_that_is_no_object_is_refused(client: httpx.Client, text: str) -> None:
    check(client.post(CHAT, content=text, headers=JSON), 400, None)


@pytest.mark.parametrize(
    ("written_as", "param"),
    [
        ('"temperature": 1e999', "temperature"),
        ('"temperature": NaN', "temperature"),
        ('"temperature": -Infinity', "temperature"),
        ('"top_p": NaN', "top_p"),
        ('"repetition_penalty": Infinity', "repetition_penalty"),
        ('"logit_bias": {"5": NaN}', "logit_bias"),
        ('"max_tokens": 1e999', "max_tokens"),
        ('"n": NaN', "n"),
        ('"temperature": 0, "temperature": -5', "temperature"),  # the last one counts
        ('"extra": 1, "extra": 2', "extra"),
    ],
)
def test_numbers_that_are_none_and_names_given_twice_are_refused(
    client: httpx.Client, model: str, written_as: str, param: str
) -> None:
    body = f'{{"model": "{model}", "prompt": "Hi", {written_as}}}'.encode()
    check(client.post(COMPLETIONS, content=body, headers=JSON), 400, param)


def post(content: bytes | Iterator[bytes] = b"{}", **headers: str) -> Send:
    return lambda client: client.post(CHAT, content=content, headers={**JSON, **headers})


def bare(client: httpx.Client, *lines: str) -> bytes:
    """What is answered to these lines of a request's head, with no body behind them."""
    head = "\r\n".join([*lines, "Host: localhost", f"Authorization: Bearer {ANN}", "Connection: close", "", ""])
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
        connection.sendall(head.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


REQUESTS: dict[str, tuple[Send, int, str]] = {
    "a body of more than 2 MiB": (post(b" " * (2 * MIB + 1)), 413, "too_long"),
    "a body of unknown length": (post(iter([b"{}"])), 411, "length_required"),
    "a form": (
        post(b"model=x", **FORM),
        415,
        "unsupported_media_type",
    ),
    "a text": (post(b"{}", **{"Content-Type": "text/plain"}), 415, "unsupported_media_type"),
    "another method": (lambda client: client.put(CHAT, json={}), 405, "method_not_allowed"),
    "GET in the place of POST": (lambda client: client.get(COMPLETIONS), 405, "method_not_allowed"),
    "OPTIONS": (lambda client: client.options(CHAT), 405, "method_not_allowed"),
    "POST in the place of GET": (lambda client: client.post("/v1/models", json={}), 405, "method_not_allowed"),
    "a path that is not there": (lambda client: client.get("/v1/embeddings"), 404, "not_found"),
    "a path that climbs": (lambda client: client.get("/v1/%2e%2e/%2e%2e/etc/passwd"), 404, "not_found"),
    "a path with a NUL": (lambda client: client.get("/v1/%00"), 404, "not_found"),
    "no model in a path": (lambda client: client.get("/v1/models/%ff%00"), 404, "model_not_found"),
    "another site's name": (post(Host="attacker.example"), 400, "wrong_host"),
    "no name": (post(Host=""), 400, "wrong_host"),
    "a wrong key": (post(Authorization="Bearer nobody's"), 401, "invalid_api_key"),
    "no key": (post(Authorization=""), 401, "invalid_api_key"),
    "an expired key": (post(Authorization=f"Bearer {EVE}"), 401, "invalid_api_key"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_no_request_of_the_protocol_gets_its_status(client: httpx.Client, what: str) -> None:
    send, status, code = REQUESTS[what]
    answer = send(client)
    param = "model" if code == "model_not_found" else None
    assert check(answer, status, param)["code"] == code
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((f"POST {CHAT} HTTP/1.1", "Content-Type: application/json"), b" 411 "),
        ((f"POST {CHAT} HTTP/1.1", "Content-Type: application/json", "Content-Length: 9" + "0" * 18), b" 413 "),
        ((f"POST {CHAT} HTTP/1.1", "Content-Length: -1"), b" 400 "),
        (("GET /v1/models HTTP/1.1", "Host: localhost"), b" 400 "),  # two names
        (("no request at all",), b" 400 "),
    ],
)
def test_what_no_http_library_sends_is_refused(client: httpx.Client, lines: tuple[str, ...], status: bytes) -> None:
    assert status in bare(client, *lines).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-priority", "first"), *(("x-deadline-s", value) for value in ("0", "-1", "soon", "nan", "inf", ""))],
)
def test_a_wrong_header_is_named(client: httpx.Client, model: str, header: str, value: str) -> None:
    body = {"model": model, "prompt": "Hi", "max_tokens": 2}
    check(client.post(COMPLETIONS, json=body, headers={header: value}), 400, header)


@pytest.mark.parametrize("text", ["a\x00b", "\ufeff", "\u202e", "\U0010ffff", "e\u0301" * 20, "<|im_start|>"])
def test_odd_texts_are_texts(client: httpx.Client, model: str, text: str) -> None:
    body = {"model": model, "prompt": f"Hi {text}", "temperature": 0, "max_tokens": 2}
    assert client.post(COMPLETIONS, json=body).status_code == 200
