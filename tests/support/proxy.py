"""A TCP proxy that disturbs its connections: it resets them, stops forwarding, or forwards slowly."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 4096
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends a reset


class Proxy:
    """Listens at `address` and forwards to `target`. `connections` counts the accepted connections."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections = 0
        self.pause_s = 0.0
        """Seconds before each chunk from the target is forwarded."""
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection. New ones are accepted."""
        while self._open:
            with contextlib.suppress(OSError):
                ended = self._open.pop()
                ended.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                ended.shutdown(socket.SHUT_RDWR)
                ended.close()

    def hold(self) -> None:
        """Stop forwarding without closing, like a machine that is gone."""
        self._flowing.clear()

    def close(self) -> None:
        """Stop listening and reset all connections."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._flowing.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                self.connections += 1
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                self._open += [client, server]
                for source, sink, slow in ((client, server, False), (server, client, True)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._forward, args=(source, sink, slow), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self._flowing.wait()
                time.sleep(self.pause_s if slow else 0)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """A proxy for `target` for a `with` block."""
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()
