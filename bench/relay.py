"""What passes between a client and a server of the OpenAI protocol: a relay that notes when each byte went by.

It is the judge of load tools on a busy machine: what a tool says of a request is compared with what the relay saw of
the same request, so that neither noise nor the order of the tools matters.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from splitlearn.loadtest.event_stream import DONE, StreamedAnswer

PIECE = 65536
ASKED = b"POST "


@dataclass
class Exchange:
    """A request and its answer, in pieces as they came, with `time.perf_counter` of this process."""

    begun: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What a relayed answer shows. `tpot_s` ends with the chunk that says how it ended, `text_tpot_s` with the last one
    that has text. Times of the relay, in seconds."""

    tokens: int
    ttft_s: float
    tpot_s: float
    text_tpot_s: float


@dataclass
class Relay:
    """A running relay: connect to `port`. `exchanges` has all requests with a body so far."""

    port: int = 0
    exchanges: list[Exchange] = field(default_factory=list)

    def seen(self) -> list[Seen]:
        """The streamed answers so far, in the order of their requests."""
        return [found for exchange in self.exchanges if (found := _seen(exchange)) is not None]


@contextmanager
def relay(to_port: int) -> Iterator[Relay]:
    """A relay on loopback to a server there."""
    found, loop = Relay(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", to_port)
        _at_once(writer)
        _at_once(back)

        def asked(at: float, piece: bytes) -> None:
            if piece.startswith(ASKED):
                found.exchanges.append(Exchange(at))

        def answered(at: float, piece: bytes) -> None:
            if found.exchanges:
                found.exchanges[-1].pieces.append((at, piece))

        await asyncio.gather(_pass_on(reader, back, asked), _pass_on(onward, writer, answered))

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[float, bytes], None]
) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(PIECE):
            note(time.perf_counter(), piece)
            writer.write(piece)
            await writer.drain()
    writer.close()


def _at_once(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _seen(exchange: Exchange) -> Seen | None:
    """What the events of an exchange say; None for an answer that was not streamed."""
    answer, texts, line = StreamedAnswer(), list[float](), b""
    for at, piece in exchange.pieces:
        *lines, line = (line + piece).split(b"\n")
        for each in (each.removeprefix(b"data:").strip() for each in lines if each.startswith(b"data:")):
            if each == DONE:
                end, first = answer.end(), texts[0]
                steps = end.tokens - 1
                return Seen(end.tokens, first - exchange.begun, (end.at - first) / steps, (texts[-1] - first) / steps)
            if answer.take(at, each):
                texts.append(at)
    return None
