"""A circuit breaker: spares a server that does not answer, and gives its clients an error at once.

After FAILURES in a row it opens for a cool-down. Then it lets one try pass. It stays open during that try, and if the
try fails for twice as long, up to LONGEST_S. A success closes it.
"""

import time
from collections.abc import Callable

FAILURES = 5
COOL_DOWN_S = 1.0
LONGEST_S = 5.0


class Breaker:
    """The breaker of one address. `failures` counts the failures since the last success."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self._cool_down_s = COOL_DOWN_S
        self.failures = 0

    def rest_s(self) -> float:
        """Seconds until the next try. 0: try now."""
        return max(0.0, self._until - self._clock())

    def trying(self) -> None:
        if self.failures >= FAILURES:
            self._until = self._clock() + self._cool_down_s

    def failed(self) -> None:
        self.failures += 1
        self.trying()
        if self.failures >= FAILURES:
            self._cool_down_s = min(2 * self._cool_down_s, LONGEST_S)

    def succeeded(self) -> None:
        self.failures, self._until, self._cool_down_s = 0, 0.0, COOL_DOWN_S
