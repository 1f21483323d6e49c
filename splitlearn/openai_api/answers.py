"""Runs requests through the arms for a server: many at once, others wait in a queue (queue.py) and leave it when their
clients go or their deadlines pass.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.errors import as_error
from splitlearn.events import Event, GenerationRequest, Kind
from splitlearn.flags.selection import FlagSet
from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.queue import Entry, Priority, RequestQueue

RETRY_S = 2
Found = Event | ArmReport


@dataclass(frozen=True)
class Job:
    """What to run: an arm, its flags, and the request. `holder` is whom it counts for. `deadline_s` is how long it may
    take in all, None for any time."""

    kind: Kind
    flags: FlagSet
    request: GenerationRequest
    priority: Priority = "interactive"
    deadline_s: float | None = None
    holder: str = ""


class Line:
    """The queue of one event loop."""

    def __init__(self, running: int, waiting: int) -> None:
        self._queue = RequestQueue(running, waiting)
        self._turns: dict[Entry, asyncio.Event] = {}

    async def enter(self, entry: Entry) -> None:
        """Wait for one's turn. Raises ApiError where too many wait."""
        if self._queue.is_full(entry):
            waiting = self._queue.waiting(entry.priority)
            said = f"{waiting} requests wait already (api.max_waiting); try again later"
            raise ApiError(429, said, code="queue_full", headers={"Retry-After": str(RETRY_S * (1 + waiting))})
        turn = self._turns[entry] = asyncio.Event()
        self._queue.add(entry)
        self._start()
        try:
            await turn.wait()
        except asyncio.CancelledError:
            self.leave(entry)
            raise

    def leave(self, entry: Entry) -> None:
        """One's turn is over."""
        self._turns.pop(entry, None)
        self._queue.remove(entry)
        self._start()

    def _start(self) -> None:
        for entry in self._queue.start():
            self._turns[entry].set()


async def run(runs: Runs, line: Line, job: Job) -> AsyncGenerator[Found]:
    """The events of `job` as they come, then its report. Closing the iterator ends the run, which frees its sessions.

    Raises ApiError.
    """
    loop, entry = asyncio.get_running_loop(), Entry(job.priority, job.request.samples)
    until = None if job.deadline_s is None else loop.time() + job.deadline_s
    try:
        async with asyncio.timeout_at(until):
            await line.enter(entry)
    except TimeoutError:
        raise _late(job) from None
    found, stop = asyncio.Queue[Found | ApiError | None](), threading.Event()

    def put(item: Found | ApiError | None) -> None:
        loop.call_soon_threadsafe(found.put_nowait, item)

    def work() -> None:
        try:
            for item in runs.serve(job.kind, job.flags, job.request, stop, job.holder, job.priority == "batch"):
                put(item)
        except Exception as error:  # whatever it is, the client hears of it
            put(ApiError.of(as_error(error, "generating")))
        finally:
            put(None)
            loop.call_soon_threadsafe(line.leave, entry)

    threading.Thread(target=work, daemon=True).start()
    end = None if until is None else loop.call_at(until, found.put_nowait, _late(job))
    try:
        while (item := await found.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item
    finally:
        stop.set()
        if end is not None:
            end.cancel()


def _late(job: Job) -> ApiError:
    said = f"x-deadline-s: the answer was not complete within {job.deadline_s:g} s."
    return ApiError(504, said, code="deadline_exceeded", headers={"x-should-retry": "false"})
