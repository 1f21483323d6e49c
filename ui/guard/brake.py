"""Rate limit of wrong logins."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_ADDRESSES = 1024


class Bucket:
    """A token bucket: holds up to `size` tries and gains one every `every_s` seconds."""

    def __init__(self, size: int, every_s: float, now: float) -> None:
        self._size, self._every_s = size, every_s
        self._tries, self._at = float(size), now

    def wait_s(self, now: float) -> float:
        """Seconds until the next try; 0.0 if one is left."""
        self._tries, self._at = min(self._size, self._tries + (now - self._at) / self._every_s), now
        return max(0.0, (1.0 - self._tries) * self._every_s)

    def add(self, tries: float) -> None:
        """Give back `tries`, or take them if negative."""
        self._tries = min(self._size, self._tries + tries)


class Brake:
    """Limits wrong logins: a burst of 5 per address, then one per 5 s; a burst of 30 in all, then one per second.

    An address that has reached its limit takes nothing from the total. There is a total because clients can forge the
    address that a proxy forwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all = Bucket(30, 1.0, clock())
        self._addresses: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, address: str) -> int:
        """Take a try for `address`. Returns 0, or the seconds to wait, in which case none is taken."""
        now = self._clock()
        bucket = self._bucket(address, now)
        wait_s = bucket.wait_s(now) or self._all.wait_s(now)
        if not wait_s:
            bucket.add(-1.0)
            self._all.add(-1.0)
        return math.ceil(wait_s)

    def give_back(self, address: str) -> None:
        """Undo a try whose password was right."""
        self._bucket(address, self._clock()).add(1.0)
        self._all.add(1.0)

    def _bucket(self, address: str, now: float) -> Bucket:
        bucket = self._addresses.setdefault(address, Bucket(5, 5.0, now))
        self._addresses.move_to_end(address)
        while len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        return bucket
