"""The controller's side of the directory: starts it, tells it where the replicas are, and starts it anew.

Ray restarts a directory whose process ends, on the same port. If another program has taken the port meanwhile, the
directory does not start, and Ray gives it up; here it is tried again.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from server.ray_trunks.directory import Directory, Entry
from server.ray_trunks.failures import Failures
from server.ray_trunks.ray_api import Lost, Ray
from splitlearn.config import ServerConfig
from splitlearn.errors import SetupError
from splitlearn.runtime import ports

log = logging.getLogger("server")


class DirectoryHandle:
    """The directory of `links` links, on this node. Raises SetupError if it does not start."""

    def __init__(self, ray: Ray, settings: ServerConfig, links: int) -> None:
        self.port = ports.check("server.", settings.host, settings.port)
        self._ray, self._links = ray, links
        self._settings = settings.model_copy(update={"port": self.port})
        self._failures = Failures()
        self._actor: Any = self._start()
        self._told: Any = ray.call(self._actor, "port")
        if isinstance(found := ray.result(self._told), Lost):
            raise SetupError(f"The directory did not start. {found.why}")

    def tell(self, entries: Sequence[Entry]) -> None:
        """Say where the replicas are, without waiting."""
        lost = self._given_up()
        if lost is not None and self._actor is not None:
            self._actor = None
            self._failures.add(lost.why)
            log.warning("the directory ended", extra={"fields": {"why": lost.why}})
        if self._actor is None:
            if time.monotonic() < self._failures.until:
                return
            self._actor = self._start()
        self._told = self._ray.call(self._actor, "update", entries)

    def _given_up(self) -> Lost | None:
        """The answer to the last call, if it says that Ray does not start the directory again."""
        if not self._ray.answered([self._told], 0.0):
            return None
        found = self._ray.result(self._told)
        if isinstance(found, Lost):
            return found if found.dead else None
        self._failures.count = 0
        return None

    def _start(self) -> Any:
        return self._ray.beside(Directory, "directory", self._settings, self._links)
