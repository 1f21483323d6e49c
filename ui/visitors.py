"""State of each visitor: her stop signal and downloads. It is dropped when she leaves.

A visitor is one open page, identified by the session hash that her browser makes up. That is untrusted text: it is only
a key of bounded tables here, and never part of a path.
"""

import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import psutil
from gradio import Request

Value = TypeVar("Value")
PREFIX = "splitlearn-page-"
# Visitors with downloads at once. The exports of one experiment take about 5 MB.
MOST_FOLDERS = 16
MOST_SIGNALS = 256
CLOCK_S = 5.0


class LeastRecent(Generic[Value]):
    """A table of at most `most` values. The least recently used one is evicted, by `drop`."""

    def __init__(self, most: int, drop: Callable[[Value], None] = lambda _: None) -> None:
        self._most, self._drop = most, drop
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value of `key`, or None. Counts as a use."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """Set the value of `key`."""
        self.forget(key)
        self._values[key] = value
        while len(self._values) > self._most:
            self._drop(self._values.popitem(last=False)[1])

    def forget(self, key: str) -> None:
        """Drop the value of `key`, if it has one."""
        if key in self._values:
            self._drop(self._values.pop(key))


def visitor(request: Request) -> str:
    """The key of one open page."""
    return str(request.session_hash)


class Stops:
    """One stop signal per visitor, for all her runs, also those that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak: a run holds its signal, which so stays here as long as the run lasts, however many visitors come.
        self._signals: WeakValueDictionary[str, threading.Event] = WeakValueDictionary()
        self._recent: LeastRecent[threading.Event] = LeastRecent(MOST_SIGNALS)

    def begin(self, visitor: str) -> None:
        """Clear the signal for a new run."""
        self.signal(visitor).clear()

    def signal(self, visitor: str) -> threading.Event:
        """The signal that ends the run of `visitor`."""
        with self._lock:
            signal = self._signals.get(visitor) or threading.Event()
            self._signals[visitor] = signal
            self._recent.put(visitor, signal)
            return signal

    def stop(self, visitor: str) -> None:
        """Stop all runs of `visitor`."""
        self.signal(visitor).set()

    def stop_all(self) -> None:
        """Stop the runs of all visitors."""
        for signal in list(self._signals.values()):
            signal.set()


class Downloads:
    """A folder of downloads per visitor, for the last MOST_FOLDERS of them.

    A context manager: all are in `folder`, which is removed at the end. Folders of a program that was killed are
    removed by the next one.
    """

    def __init__(self) -> None:
        _remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_identity(psutil.Process())}-")).resolve()
        self._lock = threading.Lock()
        self._folders: LeastRecent[Path] = LeastRecent(MOST_FOLDERS, _remove)

    def __enter__(self) -> "Downloads":
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self.folder)

    @contextmanager
    def fresh(self, visitor: str) -> Iterator[Path]:
        """An empty folder for `visitor`, to be written in a `with` block. At its end it replaces her last one.

        Not before: if she leaves meanwhile, her folder is removed, but not the one that is being written.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            with self._lock:
                self._folders.put(visitor, folder)

    def forget(self, visitor: str) -> None:
        """Remove the folder of `visitor`."""
        with self._lock:
            self._folders.forget(visitor)


def _identity(process: psutil.Process) -> str:
    """Identifies a process even if its pid is reused."""
    return f"{process.pid}-{round(process.create_time())}"


def _remove_leftovers() -> None:
    """Remove this user's folders whose process, which their names identify, has ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid, made, *_ = (*folder.name.removeprefix(PREFIX).split("-"), "", "")
        if pid.isdecimal() and made.isdecimal() and _is_own(folder) and not _runs(int(pid), int(made)):
            _remove(folder)


def _is_own(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()
    except OSError:  # gone meanwhile
        return False


def _runs(pid: int, made: int) -> bool:
    """Whether the process started at `made` still runs. Start times may shift when the clock is adjusted."""
    try:
        return abs(psutil.Process(pid).create_time() - made) < CLOCK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it cannot be asked: leave its folder alone
        return True


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
