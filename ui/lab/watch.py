"""Watching the experiment that runs: each open page that shows it has one watch, which ends when another begins."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from weakref import WeakValueDictionary

from splitlearn.lab.job import Job, JobStatus


class _Watch:
    """What tells the watch that a page began last from those before."""


class Watches:
    """The watches of one part of the page on `job`, at most one for each visitor."""

    def __init__(self, job: Job) -> None:
        self._job = job
        # The watch itself holds its value, so that there are as many as there are watches.
        self._last: WeakValueDictionary[str, _Watch] = WeakValueDictionary()

    def leave(self, visitor: str) -> None:
        """The page of that visitor was closed: what it watches goes on without it."""
        self._last.pop(visitor, None)

    async def follow(self, visitor: str) -> AsyncIterator[JobStatus]:
        """The experiment as it is now, then each time that it has gone on, to its end. Nothing if there is none.

        Ends early when the visitor leaves or watches anew."""
        mine = _Watch()
        self._last[visitor] = mine
        async for status in self._each():
            if self._last.get(visitor) is not mine:
                return
            yield status

    async def _each(self) -> AsyncIterator[JobStatus]:
        loop, changed, shown = asyncio.get_running_loop(), asyncio.Event(), None

        def wake() -> None:
            with suppress(RuntimeError):  # the page has ended
                loop.call_soon_threadsafe(changed.set)

        with self._job.calling(wake):
            while shown is None or not shown.ended:
                changed.clear()
                latest = self._job.latest
                if latest is None:
                    return
                if latest is shown:
                    await changed.wait()
                    continue
                shown = latest
                yield shown
