"""Clients of any server of the OpenAI protocol. All their requests run on one event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

from splitlearn.errors import EndpointError
from splitlearn.loadtest.causes import told
from splitlearn.loadtest.clients import NO_ROOM, WARM_UP, Answer, AnswerEnd, Conversation
from splitlearn.loadtest.endpoint import FORMS, Endpoint, Prompt, StatusError, ask, models
from splitlearn.loadtest.plan import LoadRequest, LoadTest

CLOSE_S = 5.0
REFUSED = (400, 422)
"""A server answers so to a parameter that it does not know."""
T = TypeVar("T")


class Connection:
    """The event loop and the HTTP client of an endpoint. Methods raise EndpointError."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self._http = endpoint, endpoint.http()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def begin(self, prompt: Prompt, tokens: int, found: "SimpleQueue[float | AnswerEnd | None]") -> "Future[str]":
        """Ask; `found` gets what comes, and None at the end. The future has the answer's text or what failed."""
        endpoint = self.endpoint

        async def work() -> str:
            with told(endpoint.key):
                return await ask(self._http, endpoint, endpoint.body(prompt, tokens), tokens, found.put)

        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        future.add_done_callback(lambda _: found.put(None))
        return future

    def models(self) -> list[str]:
        """The ids of the server's models."""

        async def work() -> list[str]:
            with told(self.endpoint.key):
                return await models(self._http, self.endpoint)

        return self._result(work())

    def close(self) -> None:
        """Break off what is under way."""
        with suppress(TimeoutError):
            self._result(self._end(), CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    def _result(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        finally:
            future.cancel()


class UrlClient:
    """Answers requests by asking the server."""

    def __init__(self, connection: Connection, load: LoadTest) -> None:
        self._connection, self._conversation = connection, Conversation(load)
        self._current: Future[str] | None = None
        self._closed = False

    def warm(self) -> None:
        """Connect, and let the server do what it does at a first request."""
        for _ in self.answer(WARM_UP):
            pass

    def answer(self, job: LoadRequest) -> Answer:
        """Yield when each chunk of text came, then the end."""
        said = self._conversation.ask(job)
        prompt: Prompt = said[0].content
        if self._connection.endpoint.chat:
            prompt = [{"role": message.role, "content": message.content} for message in said]
        found = SimpleQueue[float | AnswerEnd | None]()
        current = self._current = self._connection.begin(prompt, job.new_tokens, found)
        try:
            if self._closed:
                return
            while (item := found.get()) is not None:
                yield item
            self._conversation.answered(current.result())
        finally:
            current.cancel()

    def close(self) -> None:
        """Break off the current request."""
        self._closed = True
        if self._current is not None:
            self._current.cancel()


@contextmanager
def connected(endpoint: Endpoint, load: LoadTest) -> Iterator[Connection]:
    """A connection to a server that answers: its model is chosen, and a form of request that it takes is found.

    Raises EndpointError if no model or several could be meant, and if a short request fails.
    """
    connection = Connection(endpoint)
    try:
        if not endpoint.model:
            connection.endpoint = replace(endpoint, model=_only(connection.models(), endpoint.url))
        _settle(connection, load)
        yield connection
    finally:
        connection.close()


def _only(ids: list[str], url: str) -> str:
    if len(ids) != 1:
        shown = ", ".join(ids[:20]) or "none"
        raise EndpointError(f"{url} lists {len(ids)} models; choose one with --model: {shown}")
    return ids[0]


def _settle(connection: Connection, load: LoadTest) -> None:
    """Find the first of FORMS that the server takes."""
    for form in FORMS:
        connection.endpoint = replace(connection.endpoint, form=form)
        try:
            with suppress(*NO_ROOM):
                UrlClient(connection, load).warm()
            return
        except StatusError as error:
            if error.status not in REFUSED or form is FORMS[-1]:
                raise
