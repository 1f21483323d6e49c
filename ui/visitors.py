"""What the page keeps for a visitor, and drops when she leaves.

A visitor is one open page. She is known by the session hash that her browser makes up: text from outside, so that it is
a key of bounded tables here and never part of a path. Every folder has a name that is made here.
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
    """A table of at most `most` values. The one that was not used for the longest time goes first, by `drop`."""

    def __init__(self, most: int, drop: Callable[[Value], None] = lambda _: None) -> None:
        self._most, self._drop = most, drop
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value of `key`, which counts as a use; None where there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """Keep `value` in the place of what `key` had."""
        self.forget(key)
        self._values[key] = value
        while len(self._values) > self._most:
            self._drop(self._values.popitem(last=False)[1])

    def forget(self, key: str) -> None:
        """Drop the value of `key`, if it has one."""
        if key in self._values:
            self._drop(self._values.pop(key))


def visitor(request: Request) -> str:
    """What tells one open page from another."""
    return str(request.session_hash)


class Line:
    """Who runs and who waits, in order: Gradio runs the calls of all visitors one after the other, first come first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._visitors: list[str] = []

    def join(self, visitor: str) -> int:
        """Stand at the end, where the visitor does not stand yet. Returns her place: 0 runs, 1 is next."""
        with self._lock:
            if visitor not in self._visitors:
                self._visitors.append(visitor)
            return self._visitors.index(visitor)

    @contextmanager
    def turn(self, visitor: str) -> Iterator[None]:
        """Stand before all others, and leave at the end: Gradio gave the turn to `visitor`, whoever joined before."""
        with self._lock:
            self._visitors = [visitor, *(other for other in self._visitors if other != visitor)]
        try:
            yield
        finally:
            self.leave(visitor)

    def leave(self, visitor: str) -> None:
        """The visitor's run has ended, or she has left."""
        with self._lock:
            if visitor in self._visitors:
                self._visitors.remove(visitor)

    @property
    def taken(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self._visitors)

    def has(self, visitor: str) -> bool:
        """Whether the visitor runs or waits."""
        with self._lock:
            return visitor in self._visitors

    def others(self, visitor: str) -> int:
        """How many visitors are in the line besides `visitor`."""
        with self._lock:
            return sum(each != visitor for each in self._visitors)

    def place(self, visitor: str) -> int:
        """The place of `visitor`; 0 for one who does not wait."""
        with self._lock:
            return self._visitors.index(visitor) if visitor in self._visitors else 0


class Stops:
    """One stop signal for each visitor: the same one for all her runs, also for those that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A run holds its signal, so that it is found for as long as the run lasts, whoever else comes meanwhile.
        self._signals: WeakValueDictionary[str, threading.Event] = WeakValueDictionary()
        self._recent: LeastRecent[threading.Event] = LeastRecent(MOST_SIGNALS)

    def begin(self, visitor: str) -> None:
        """A run was asked for: what was stopped before does not stop it."""
        self.signal(visitor).clear()

    def signal(self, visitor: str) -> threading.Event:
        """The signal that ends the run of `visitor`."""
        with self._lock:
            signal = self._signals.get(visitor) or threading.Event()
            self._signals[visitor] = signal
            self._recent.put(visitor, signal)
            return signal

    def stop(self, visitor: str) -> None:
        """End the run of `visitor`, if there is one, and any that waits."""
        self.signal(visitor).set()

    def stop_all(self) -> None:
        """End every run."""
        for signal in list(self._signals.values()):
            signal.set()


class Downloads:
    """A folder for each visitor who has opened something to download, for the last MOST_FOLDERS of them.

    Use as a context: all of it is below `folder`, which is removed at the end. What a run of the program left that was
    killed is removed by the next one.
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

    def fresh(self, visitor: str) -> Path:
        """An empty folder for `visitor`; what she had before is removed."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with self._lock:
            self._folders.put(visitor, folder)
        return folder

    def forget(self, visitor: str) -> None:
        """The visitor has left: remove what is hers."""
        with self._lock:
            self._folders.forget(visitor)


def _identity(process: psutil.Process) -> str:
    """A process, also when its number is given to another one later."""
    return f"{process.pid}-{round(process.create_time())}"


def _remove_leftovers() -> None:
    """Remove the folders of this user whose process has ended. Their names say which process that is."""
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
    """Whether the process that began at `made` runs. That is counted from the boot, whose time may be mended."""
    try:
        return abs(psutil.Process(pid).create_time() - made) < CLOCK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it cannot be asked: leave its folder alone
        return True


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
