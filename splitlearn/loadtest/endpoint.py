"""A server of the OpenAI protocol that is measured: where it is, and what is asked of it, over httpx.

It is not trusted. Whatever it sends or leaves out, a request ends: it has a deadline from its connection to its last
byte, and a limit in bytes. The key goes into the request's header and nowhere else.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from splitlearn import address
from splitlearn.errors import EndpointError, EndpointFull, InputError
from splitlearn.loadtest.clients import AnswerEnd
from splitlearn.loadtest.event_stream import DONE, Json, StreamedAnswer, data_lines, message_of, parsed

CONNECT_S = 10.0
STALL_S = 120.0
"""Longest pause without a byte."""
ANSWER_S = 600.0
END_S = 1.0
"""For the end of a stream after its last event; a connection that then stays open is closed."""
IDLE_S = 4.0
"""An idle connection is closed after this time: servers that close it after 5 s would race with the next request."""
MOST_RETRY_S = 60.0
BODY_BYTES = 1 << 20
BYTES_PER_TOKEN = 16 * 1024
SAID = 200
"""Characters of a server's own words in an error, and of a model's id."""
FULL = 429
Prompt = str | list[Json]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class Form:
    """How a request limits its answer; servers differ in what they take."""

    limit: str
    ignore_eos: bool


FORMS = (Form("max_tokens", True), Form("max_tokens", False), Form("max_completion_tokens", False))


@dataclass(frozen=True)
class Endpoint:
    """A server of the OpenAI protocol at `url`, which mostly ends in /v1. Without `chat`, text completions are asked.

    Raises InputError for what is no URL of http or https, and for one with a password, a query or a fragment in it.
    """

    url: str
    model: str = ""
    chat: bool = True
    key: str | None = field(default=None, repr=False)
    form: Form = FORMS[0]

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked(self.url))

    @property
    def key_in_the_clear(self) -> bool:
        """Whether a key would go to another machine without TLS."""
        url = httpx.URL(self.url)
        return self.key is not None and url.scheme == "http" and not address.is_loopback(url.host)

    def body(self, prompt: Prompt, tokens: int) -> Json:
        """A request for an answer of at most `tokens` tokens."""
        asked: Json = {"messages" if self.chat else "prompt": prompt, self.form.limit: tokens}
        if self.form.ignore_eos:
            asked["ignore_eos"] = True
        usage = {"include_usage": True}
        return {"model": self.model, **asked, "temperature": 0, "stream": True, "stream_options": usage}

    def http(self) -> httpx.AsyncClient:
        """A client for the requests; certificates are verified."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "splitlearn-loadtest"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S)
        timeout = httpx.Timeout(STALL_S, connect=CONNECT_S)
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)


def key_of(name: str) -> str:
    """The API key in the environment variable `name`. Raises InputError, which never has the key in it."""
    key = os.environ.get(name, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise InputError("key-env", name, "an environment variable that is set to an API key of ASCII characters")
    return key


async def models(http: httpx.AsyncClient, endpoint: Endpoint) -> list[str]:
    """The ids of the server's models. Raises EndpointError."""
    async with _deadline(CONNECT_S + STALL_S), _sent(http, "GET", f"{endpoint.url}/models") as response:
        listed = parsed(await _body(response)).get("data")
    found = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [each for each in found if isinstance(each, str) and 0 < len(each) <= SAID]


async def ask(
    http: httpx.AsyncClient, endpoint: Endpoint, body: Json, tokens: int, put: Callable[[float | AnswerEnd], None]
) -> str:
    """Ask for an answer of at most `tokens`, `put` the time of each chunk with text, then the end. Returns the text.

    Raises EndpointFull and EndpointError.
    """
    path = "chat/completions" if endpoint.chat else "completions"
    most, answer = BODY_BYTES + tokens * BYTES_PER_TOKEN, StreamedAnswer()
    async with _deadline(ANSWER_S), _sent(http, "POST", f"{endpoint.url}/{path}", body) as response:
        pieces = response.aiter_raw()
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise EndpointError("the answer is no stream of events")
        async for at, data in data_lines(pieces, most):
            if data == DONE:
                put(answer.end())
                await _rest(pieces)
                return answer.text
            if answer.take(at, data):
                put(at)
    raise EndpointError("the stream ended without [DONE]")


async def _rest(pieces: AsyncIterator[bytes]) -> None:
    """Read to the end of the body, where it comes at once: only then can the connection be used again."""
    try:
        async with asyncio.timeout(END_S):
            async for _ in pieces:
                return
    except (TimeoutError, httpx.HTTPError):
        return


@asynccontextmanager
async def _sent(http: httpx.AsyncClient, method: str, url: str, body: Json | None = None) -> AsyncIterator[Any]:
    """The response to a request, of status 200 and not compressed. Raises EndpointFull and EndpointError."""
    sent = None if body is None else json.dumps(body).encode()
    headers = {} if sent is None else {"Content-Type": "application/json"}
    async with http.stream(method, url, content=sent, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise await _refusal(response)
        _check_plain(response)
        yield response


def _check_plain(response: httpx.Response) -> None:
    """Raise EndpointError for a compressed body: a small one may become a very large one."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise EndpointError("the answer is compressed, though nothing of that kind was asked for")


async def _refusal(response: httpx.Response) -> EndpointError:
    """What another status than 200 means."""
    try:
        _check_plain(response)
        said = message_of(parsed(await _body(response)))
    except (EndpointError, httpx.HTTPError):  # the status is known all the same
        said = ""
    text = f"HTTP {response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")
    if response.status_code == FULL:
        return EndpointFull(text, _retry_s(response.headers.get("retry-after", "")))
    return StatusError(text, response.status_code)


class StatusError(EndpointError):
    """The server refused a request with the HTTP `status`."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def _retry_s(text: str) -> float:
    """The seconds of a Retry-After header."""
    return min(float(text), MOST_RETRY_S) if text.isascii() and text.isdigit() else 1.0


async def _body(response: httpx.Response) -> bytes:
    """A body of at most BODY_BYTES."""
    found = bytearray()
    async for piece in response.aiter_raw():
        found += piece
        if len(found) > BODY_BYTES:
            raise EndpointError(f"the answer was longer than {BODY_BYTES} bytes")
    return bytes(found)


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EndpointError(f"no whole answer within {seconds:g} s") from None


def _checked(text: str) -> str:
    expected = "an http or https URL without password and query, such as http://127.0.0.1:8000/v1"
    try:
        url = httpx.URL(text.strip())
        well = url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 1) < 65536
    except (httpx.InvalidURL, ValueError):
        raise InputError("url", text, expected) from None
    if url.userinfo or url.query or url.fragment:
        raise InputError("url", f"{url.scheme}://{url.host}...", expected)
    if not well:
        raise InputError("url", text, expected)
    return str(url).rstrip("/")
