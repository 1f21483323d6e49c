"""Two threads that do one step together: its work comes in phases, a phase in shares, and whoever has nothing to do
takes the next share (kernels/team_phases.py).

One leads: it opens a phase, takes shares of it as the other does, and goes on when all are done. The other helps, and
looks for work without sleeping as long as the step lasts: a phase is over in less time than it takes to wake a thread
up. It is not waited for while it has no share, so that the leader is as fast alone as with a helper that comes late.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from splitlearn.kernels.sources import digest

# Of a phase: with one for each thread both wait for the slower, more cost more than they even out.
SHARES = 4
# Where in a team's memory, in cache lines of their own: the number of the phase that is open and how many of its shares
# are taken (CLOSED outside a step), in one number; how many are done, and how many in vain; the address of what does a
# share; what the phase is.
OPEN, DONE, FAILED, WORK, ARGUMENTS, SIZE = 8, 24, 25, 40, 41, 56
NUMBER_AT = 16
CLOSED = (1 << NUMBER_AT) - 1
# These numbers go into machine code that is kept (kernels/jit.py): for the modules that they came from, not for later
# ones.
digest(Path(__file__).parent)


class Lead(NamedTuple):
    """What the leader of a step goes by: a team's memory, and how many shares its phases have."""

    memory: NDArray[np.int64]
    shares: int


class Team:
    """A leader and, where there is one, a helper, who helps by `help_out(*lead)`; `work` is the address of what does a
    share."""

    def __init__(self, help_out: Callable[..., None], work: int, *, helped: bool) -> None:
        self._help_out, self._work, self._helped = help_out, work, helped
        self._lead = Lead(_memory(work), SHARES)
        self._helping: Future[None] | None = None
        self._leading = Lock()
        self._close()

    @contextmanager
    def leading(self) -> Iterator[Lead]:
        """Inside, one who opens phases is helped; not where the helper has a leader already."""
        if not self._helped or not self._leading.acquire(blocking=False):
            yield self.alone()
            return
        try:
            self._lead.memory[OPEN] -= CLOSED - SHARES  # nothing is left of the phase before the first
            self._call()
            yield self._lead
        finally:
            self._close()
            self._leading.release()

    def alone(self) -> Lead:
        """Of one who is not helped."""
        return Lead(_memory(self._work), 1)

    def wait(self) -> None:
        """Until the helper is not at work. Raises what it raised."""
        helping, self._helping = self._helping, None
        if helping is not None:
            helping.result()

    def _close(self) -> None:
        self._lead.memory[OPEN] |= CLOSED

    def _call(self) -> None:
        if self._helping is not None and not self._helping.done():
            return  # it had no core until now
        self.wait()
        with suppress(RuntimeError):  # no thread can be started: without, then
            self._helping = helpers().submit(self._help_out, *self._lead)


@cache
def helpers() -> ThreadPoolExecutor:
    """Threads for what is computed without torch's own."""
    return ThreadPoolExecutor(thread_name_prefix="helper")


def _memory(work: int) -> NDArray[np.int64]:
    memory = np.zeros(SIZE, np.int64)
    memory[WORK] = work
    return memory
