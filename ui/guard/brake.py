"""A brake on logins: how many passwords may be tried."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_ADDRESSES = 1024


class Bucket:
    """Holds up to `size` tries and gets one more every `every_s` seconds."""

    def __init__(self, size: int, every_s: float, now: float) -> None:
        self._size, self._every_s = size, every_s
        self._tries, self._at = float(size), now

    def wait_s(self, now: float) -> float:
        """Seconds until there is a try; 0.0 where there is one."""
        self._tries, self._at = min(self._size, self._tries + (now - self._at) / self._every_s), now
        return max(0.0, (1.0 - self._tries) * self._every_s)

    def add(self, tries: float) -> None:
        """Take tries (below zero) or give them back."""
        self._tries = min(self._size, self._tries + tries)


class Brake:
    """Wrong logins: five at once from one address, then one in five seconds; thirty from all, then one a second.

    An address that is at its end does not take from the others. All together are limited, too, since addresses can be
    made up where a proxy hands them on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all = Bucket(30, 1.0, clock())
        self._addresses: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, address: str) -> int:
        """Take a try for `address`: 0, or the seconds after which it may try again, in which case none is taken."""
        now = self._clock()
        bucket = self._bucket(address, now)
        wait_s = bucket.wait_s(now) or self._all.wait_s(now)
        if not wait_s:
            bucket.add(-1.0)
            self._all.add(-1.0)
        return math.ceil(wait_s)

    def give_back(self, address: str) -> None:
        """The try was right, and so does not count."""
        self._bucket(address, self._clock()).add(1.0)
        self._all.add(1.0)

    def _bucket(self, address: str, now: float) -> Bucket:
        bucket = self._addresses.setdefault(address, Bucket(5, 5.0, now))
        self._addresses.move_to_end(address)
        while len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        return bucket
