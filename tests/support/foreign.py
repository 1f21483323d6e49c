"""A server of the OpenAI protocol as a stranger might have written it: over a real socket, with any answer at all."""

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

STREAM = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@dataclass
class Asked:
    """A request: its path, headers (names in lower case) and body; and the way back to its client."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    sent: int = 0

    async def send(self, data: str | bytes) -> None:
        """Send, no faster than the client reads."""
        data = data.encode() if isinstance(data, str) else data
        self.writer.write(data)
        await self.writer.drain()
        self.sent += len(data)

    async def status(self, line: str, headers: str = "", **error: str) -> None:
        """Answer with a status and the protocol's error. The connection is closed then, so the client must not take it
        for another request."""
        body, close = json.dumps({"error": error}), "Connection: close\r\n"
        await self.send(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\n{close}{headers}\r\n{body}")


Behaviour = Callable[[Asked], Awaitable[None]]


def event(**chunk: Any) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(chunk)}\n\n"


def text(content: str, end: str | None = None) -> str:
    """A chunk of a chat's text."""
    return event(choices=[{"index": 0, "delta": {"content": content}, "finish_reason": end}])


def usage(tokens: int, prompt: int = 5) -> str:
    """The last chunk."""
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": tokens})


async def well(asked: Asked) -> None:
    """Answer as the protocol says: two tokens in each chunk but the last, which has the rest."""
    limit = asked.body.get("max_tokens") or asked.body["max_completion_tokens"]
    await asked.send(STREAM + event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]))
    for _ in range((limit + 1) // 2):
        await asked.send(text("so so "))
    await asked.send(text("", "length") + usage(limit) + "data: [DONE]\n\n")


@dataclass
class Foreign:
    """A running server. `asked` has all requests but those for the models."""

    url: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def foreign(behaviour: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[Foreign]:
    """A server of one model that answers each request by `behaviour`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    found = Foreign("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async for each in _requests(reader, writer):
                if each.path == "/v1/models":
                    await _list_models(each)
                else:
                    found.asked.append(each)
                    await behaviour(each)
                    break
        writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    port = server.sockets[0].getsockname()[1]
    found.url = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{port}/v1"
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _list_models(asked: Asked) -> None:
    body = json.dumps({"object": "list", "data": [{"id": "one"}]})
    await asked.send(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}")


async def _requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[Asked]:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        yield Asked(first.split()[1], headers, json.loads(body or b"{}"), writer)


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
