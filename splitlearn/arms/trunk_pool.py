"""Embedded trunk servers: one for each set of the trunk's load and process flags, started when first asked for."""

import threading
from collections.abc import Callable

from splitlearn.arms import ray_trunk
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.ray_trunk import RayTrunk
from splitlearn.config import Config, serving
from splitlearn.flags.registry import of_scope
from splitlearn.runtime.process_pool import ProcessPool


class TrunkPool:
    """`has_memory` says whether one more trunk may be kept beside those that run. Any thread may ask."""

    def __init__(self, config: Config, has_memory: Callable[[], bool]) -> None:
        self._config = config
        self._closing = threading.Event()
        self._lock = threading.Lock()  # a page that opens asks for a trunk beside the run that does
        self._trunks = ProcessPool[frozenset[str], EmbeddedTrunk | RayTrunk](lambda count: has_memory())

    @property
    def latest(self) -> frozenset[str] | None:
        """The flags of the trunk used last; None before the first one."""
        with self._lock:
            return self._trunks.latest

    def address(self, flags: frozenset[str]) -> str:
        """Where the trunk with `flags` listens. Starts it, and ends the least recently used ones where memory is short.
        Raises SetupError when it does not start."""
        own = of_scope(flags, "load", "process")
        with self._lock:
            return self._trunks.obtain(own, lambda: self._start(own)).address

    def pids(self) -> list[int]:
        """The processes of the trunks that run."""
        with self._lock:
            return [trunk.pid for trunk in self._trunks]

    def close(self) -> None:
        """End all trunks, and one that starts at this moment."""
        self._closing.set()
        with self._lock:
            self._trunks.close()

    def _start(self, flags: frozenset[str]) -> EmbeddedTrunk | RayTrunk:
        if self._config.trunk.on_ray:
            return ray_trunk.embedded(serving(self._config, flags), self._closing)
        return EmbeddedTrunk(serving(self._config, flags), stop=self._closing)
