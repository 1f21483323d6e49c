"""How often in a row something did not start, and when to try again."""

import time
from dataclasses import dataclass

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass
class Failures:
    """The count, the time (`time.monotonic`) of the next try, and the last reason."""

    count: int = 0
    until: float = 0.0
    last: str = ""

    def add(self, reason: str) -> None:
        """Count one more, which makes the pause longer."""
        self.count, self.last = self.count + 1, reason
        self.until = time.monotonic() + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self.count)
