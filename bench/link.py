"""An emulated link: a TCP proxy that holds back what goes through it, in a process of its own.

Each direction has its own capacity and half of the round-trip time, as on a full-duplex line. The kernel of these
machines has no netem. What it cannot show: loss, and TCP's own slow start over the long way (either half is local).
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from splitlearn.runtime import process

CHUNK = 16384


@dataclass(frozen=True)
class Shape:
    """A link's round-trip time in seconds, and the bits that it takes a second in each direction; None: any number."""

    rtt_s: float
    bits_per_s: float | None = None

    def __str__(self) -> str:
        rate = f", {self.bits_per_s / 1e6:g} Mbit/s" if self.bits_per_s else ""
        return f"{self.rtt_s * 1e3:g} ms{rate}"

    def transfer_s(self, size: int) -> float:
        """How long `size` bytes take to be put on the link."""
        return 8 * size / self.bits_per_s if self.bits_per_s else 0.0


@contextmanager
def link(target: str, shape: Shape) -> Iterator[str]:
    """The address host:port of a link to `target`."""
    child = process.start("The emulated link", _main, target, shape)
    try:
        yield child.receive()
    finally:
        child.stop()


def _main(connection: Connection, target: str, shape: Shape) -> None:
    asyncio.run(_serve(connection, target, shape))


async def _serve(connection: Connection, target: str, shape: Shape) -> None:
    host, _, port = target.rpartition(":")

    async def meet(near: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        far, request = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_carry(near, request, shape), _carry(far, answer, shape))

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    connection.send(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, shape: Shape) -> None:
    """Hand on what comes, each chunk when the line has taken it and half of the round trip has passed."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    delivering = asyncio.create_task(_deliver(under_way, sink))
    free = 0.0
    while data := await source.read(CHUNK):
        free = max(free, time.perf_counter()) + shape.transfer_s(len(data))
        under_way.put_nowait((free + shape.rtt_s / 2, data))
    under_way.put_nowait((0.0, b""))
    await delivering


async def _deliver(under_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
    while True:
        due, data = await under_way.get()
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if not data:
            sink.close()
            return
        sink.write(data)
        await sink.drain()
