"""Which files of a folder are opened, by whatever process and library: what inotify of the kernel says."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
_EVENT = struct.Struct("iIII")


@contextmanager
def opened_in(folder: Path) -> Iterator[set[str]]:
    """The names of the files in `folder` that are opened inside; complete once the context is left."""
    names = set[str]()
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(folder), IN_OPEN) >= 0, ctypes.get_errno()
        yield names
        names |= set(_names(watch))
    finally:
        os.close(watch)


def _names(watch: int) -> Iterator[str]:
    """The names in the events that wait to be read; the folder itself has none."""
    while True:
        try:
            data = os.read(watch, 1 << 16)
        except BlockingIOError:
            return
        while data:
            *_, length = _EVENT.unpack_from(data)
            end = _EVENT.size + length
            if name := data[_EVENT.size : end].rstrip(b"\0"):
                yield os.fsdecode(name)
            data = data[end:]
