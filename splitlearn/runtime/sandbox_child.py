"""The loop of a sandbox's child process (sandbox.py): read a request, bound it, answer it.

The standard input is a socket. Each message is its length in four bytes, then JSON.
"""

import json
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HEADER_BYTES = 4
Handle = Callable[[dict[str, Any]], dict[str, Any]]
_KEPT_SHARE = 4
"""A child that keeps a quarter of its memory after a request answers no further one."""


def serve(handle: Handle, memory_bytes: int) -> None:
    """Answer requests by `handle` until the other end closes. A request may take `memory_bytes` more than there are
    now, or gets a reply that says so in `failed`; of CPU time its `cpu_s`, or this process ends by SIGPROF."""
    before = _address_space()
    if before:
        resource.setrlimit(resource.RLIMIT_AS, (before + memory_bytes, before + memory_bytes))
    most = before + memory_bytes // _KEPT_SHARE
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as incoming:
        while header := incoming.read(HEADER_BYTES):
            data = incoming.read(int.from_bytes(header))
            try:
                reply = _bounded(handle, data, most)
            except MemoryError:
                reply = as_bytes({"failed": f"takes more than {memory_bytes >> 20} MiB of memory", "last": True})
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(reply)


def as_bytes(message: Mapping[str, Any]) -> bytes:
    """A message with its length. Half characters of UTF-16, which JSON can have, stay what they are."""
    data = json.dumps(message, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    return len(data).to_bytes(HEADER_BYTES) + data


def as_message(data: bytes) -> dict[str, Any]:
    """The message of `as_bytes`, from what is behind its length."""
    found: dict[str, Any] = json.loads(data.decode(errors="surrogatepass"))
    return found


def _bounded(handle: Handle, data: bytes, most: int) -> bytes:
    request = as_message(data)
    # The default action of its signal ends a process in the midst of a product of long integers, too.
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
    reply = handle(request)
    if _address_space() > most:
        reply["last"] = True
    return as_bytes(reply)


def _address_space() -> int:
    """Its size in bytes; 0 on systems other than Linux, where it cannot be limited."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
