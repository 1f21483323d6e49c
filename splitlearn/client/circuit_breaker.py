"""A circuit breaker: keeps a client from hammering a server that is dead, and lets it know at once.

After FAILURES in a row nothing is tried for a cool-down. Then one try passes, as a probe: while it is out, and after it
failed, the others wait again, twice as long each time up to LONGEST_S. A success closes the circuit.
"""

import time
from collections.abc import Callable

FAILURES = 5
COOL_DOWN_S = 1.0
LONGEST_S = 5.0


class Breaker:
    """The circuit to one address. `failures` counts those since the last success."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self._cool_down_s = COOL_DOWN_S
        self.failures = 0

    def rest_s(self) -> float:
        """Seconds until the next try may be made; 0 when it may be made now."""
        return max(0.0, self._until - self._clock())

    def trying(self) -> None:
        """A try begins."""
        if self.failures >= FAILURES:
            self._until = self._clock() + self._cool_down_s

    def failed(self) -> None:
        """It failed."""
        self.failures += 1
        if self.failures >= FAILURES:
            self._until = self._clock() + self._cool_down_s
            self._cool_down_s = min(2 * self._cool_down_s, LONGEST_S)

    def succeeded(self) -> None:
        """It did what it was for."""
        self.failures, self._until, self._cool_down_s = 0, 0.0, COOL_DOWN_S
