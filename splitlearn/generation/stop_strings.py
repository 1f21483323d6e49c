"""Stop strings in streamed text: holds back text that may be the beginning of one, and ends at a whole one."""

from collections.abc import Sequence


class StopStrings:
    """Takes text increments, and returns the text that is safe to show. `found` is True after a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be shown after the increment `text`, without a stop string and anything after it."""
        if self.found:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts), drop_rest=True)
        return self._release(len(self._held) - self._beginnings())

    def flush(self, text: str) -> str:
        """The rest at the end: the text that was held back for an incomplete stop string."""
        return self.feed(text) + ("" if self.found else self._release(len(self._held)))

    def _beginnings(self) -> int:
        """The length of the longest end of the held text that is the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((size for size in ends if any(stop.startswith(self._held[-size:]) for stop in self._stops)), 0)

    def _release(self, size: int, drop_rest: bool = False) -> str:
        shown, rest = self._held[:size], self._held[size:]
        self._held = "" if drop_rest else rest
        return shown
