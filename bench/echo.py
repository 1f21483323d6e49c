"""A gRPC echo server in its own process: the round-trip time of a trunk step's bytes, without a trunk.

The server holds each message for a given time and reports how long it did, so that the client waits as long as for a
trunk. Meanwhile one kind sleeps, and the other reads as much memory as a trunk: reading 80 MB of weights evicts gRPC's
code from the processor's caches.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import grpc
import torch

from splitlearn.runtime import process

METHOD = "/echo/Echo"
SLEEPS, READS = "sleeps", "reads memory"
# Of a trunk's answer, which also carries durations and so is longer than its step; and of the echo's own header.
MESSAGE_BYTES, HEADER = 2327, 12
WEIGHTS_BYTES, READ = 80 << 20, 1 << 18


class Memory:
    """A buffer of the size of a trunk's weights."""

    def __init__(self) -> None:
        self._values, self._at = torch.zeros(WEIGHTS_BYTES // 4), 0

    def read(self, seconds: float) -> None:
        """Read on from where the last call stopped, for `seconds`."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._values[self._at : self._at + READ].sum()
            self._at = (self._at + READ) % len(self._values)


class Echo:
    """A stream to its own echo server, of the kind SLEEPS or READS."""

    def __init__(self, kind: str) -> None:
        self._child = process.start("The echo server", _serve, kind)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(self._child.receive())
        method: Any = self._channel.stream_stream(METHOD)
        self._call = method(iter(self._outgoing.get, None))

    def step(self, hold_s: float, data: bytes = b"") -> float:
        """Send `data`, padded to a step's bytes, and get it back. Returns the round trip without the server's hold, in
        seconds."""
        message = data.ljust(MESSAGE_BYTES, b"\0")
        started = time.perf_counter()
        self._outgoing.put(b"%12.9f" % hold_s + message[HEADER:])
        reply = next(self._call)
        return time.perf_counter() - started - float(reply[:HEADER])

    def close(self) -> None:
        """End the stream and the server."""
        self._outgoing.put(None)
        self._channel.close()
        self._child.stop()


def _serve(connection: Connection, kind: str) -> None:
    """The echo server's process."""
    torch.set_num_threads(1)
    hold = Memory().read if kind == READS else time.sleep

    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in requests:
            started = time.perf_counter()
            hold(float(message[:HEADER]))
            yield b"%12.9f" % (time.perf_counter() - started) + message[HEADER:]

    handler = grpc.method_handlers_generic_handler("echo", {"Echo": grpc.stream_stream_rpc_method_handler(echo)})
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(f"127.0.0.1:{port}")
    threading.Event().wait()
