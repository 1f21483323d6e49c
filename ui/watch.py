"""Follow work in the background. Each open page has at most one watch; a new one ends the last."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Generic
from weakref import WeakValueDictionary

from splitlearn.runtime.background import Background, Status


class _Watch:
    """Identifies one watch of a page."""


class Watches(Generic[Status]):
    """The watches of one part of the page on `job`, at most one per visitor."""

    def __init__(self, job: Background[Status]) -> None:
        self._job = job
        # Weak, so that an entry goes with the generator that holds its _Watch.
        self._last: WeakValueDictionary[str, _Watch] = WeakValueDictionary()

    def leave(self, visitor: str) -> None:
        """End the watch of a visitor whose page was closed. The work goes on."""
        self._last.pop(visitor, None)

    async def follow(self, visitor: str) -> AsyncIterator[Status]:
        """Yield the work's status now and on each progress, to its end. Yields nothing if there is none.

        Ends early when the visitor leaves or follows again."""
        mine = _Watch()
        self._last[visitor] = mine
        async for status in self._each():
            if self._last.get(visitor) is not mine:
                return
            yield status

    async def _each(self) -> AsyncIterator[Status]:
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
