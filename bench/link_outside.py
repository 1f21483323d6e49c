"""Measure an emulated link from outside: plain sockets through the proxy to a plain server.

RTT is that of one byte, bandwidth that of many bytes each way.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from splitlearn.address import Address
from splitlearn.link.emulated import Link
from splitlearn.link.proxy import Proxy
from splitlearn.runtime import process

ECHO, RECEIVE, SEND = b"e", b"r", b"s"
PINGS_S, BULK_S, LEAST_PINGS = 3.0, 2.0, 15
SIZE, RESULT = struct.Struct("Q"), struct.Struct("d")


@dataclass(frozen=True)
class Measurement:
    """The median RTT of a link, and its bits per second each way."""

    rtt_s: float
    up_bits_per_s: float
    down_bits_per_s: float


@contextmanager
def server() -> Iterator[str]:
    """Run a plain server in its own process. Yields its address."""
    child = process.start("The plain server", _serve)
    try:
        yield child.receive()
    finally:
        child.stop()


def measure(proxy: Proxy, target: str, link: Link) -> Measurement:
    """Shape the proxy's link to `target` and measure it."""
    proxy.shape(link)
    near = proxy.route(target)
    up, down = (int(rate * 1e6 / 8 * BULK_S) for rate in (link.up_mbit or 1000, link.down_mbit or 1000))
    with _connected(near, RECEIVE) as client:
        client.sendall(SIZE.pack(up) + bytes(up))
        (up_bits,) = RESULT.unpack(_exactly(client, RESULT.size))
    with _connected(near, SEND) as client:
        client.sendall(SIZE.pack(down))
        down_bits = _rate(client, down)
    return Measurement(_round_trip_s(near, max(LEAST_PINGS, int(PINGS_S / (link.rtt_ms / 1e3)))), up_bits, down_bits)


def _round_trip_s(address: str, count: int) -> float:
    spent = []
    with _connected(address, ECHO) as client:
        for _ in range(count + 1):
            started = time.perf_counter()
            client.sendall(b"x")
            client.recv(1)
            spent.append(time.perf_counter() - started)
    return median(spent[1:])


def _rate(source: socket.socket, size: int) -> float:
    """Bits per second at which `size` bytes arrive, counted after the first read."""
    got = first = len(source.recv(1 << 16))
    started = time.perf_counter()
    while got < size:
        got += len(source.recv(min(1 << 16, size - got)))
    return 8 * (got - first) / (time.perf_counter() - started)


@contextmanager
def _connected(address: str, what: bytes) -> Iterator[socket.socket]:
    found = Address.parse(address)
    with socket.create_connection((found.host, found.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(what)
        yield client


def _exactly(source: socket.socket, size: int) -> bytes:
    return source.recv(size, socket.MSG_WAITALL)


def _serve(connection: Connection) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    connection.send(f"127.0.0.1:{listening.getsockname()[1]}")
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_answer, args=(client,), daemon=True).start()


def _answer(client: socket.socket) -> None:
    with client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        what = client.recv(1)
        if what == ECHO:
            while data := client.recv(1):
                client.sendall(data)
        elif what:
            (size,) = SIZE.unpack(_exactly(client, SIZE.size))
            client.sendall(RESULT.pack(_rate(client, size)) if what == RECEIVE else bytes(size))
