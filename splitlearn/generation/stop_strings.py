"""Stop strings in streamed text: hold back what may be the beginning of one, end where one is whole."""

from collections.abc import Sequence


class StopStrings:
    """Feed text increments; get back what is safe to show. `found` is True once a stop string was met."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be shown after `text` came in; nothing of a stop string or after it."""
        if self.found:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts), drop_rest=True)
        return self._release(len(self._held) - self._beginnings())

    def flush(self, text: str) -> str:
        """The rest, at the end: what was held back for a stop string that did not come."""
        return self.feed(text) + ("" if self.found else self._release(len(self._held)))

    def _beginnings(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((size for size in ends if any(stop.startswith(self._held[-size:]) for stop in self._stops)), 0)

    def _release(self, size: int, drop_rest: bool = False) -> str:
        shown, rest = self._held[:size], self._held[size:]
        self._held = "" if drop_rest else rest
        return shown
