"""A variant: a trunk server for another set of flags, as a child process. Its start can be cancelled at any moment."""

import logging
import threading
import time
from collections.abc import Callable

import grpc

from server.memory import Memory
from splitlearn.arms.embedded_server import Server
from splitlearn.config import Config, ServerTls, serving
from splitlearn.errors import SplitlearnError, TrunkFailed, TrunkUnavailable, as_error
from splitlearn.wire.channel import open_channel

STOP_TIMEOUT_S = 2.0
NEVER = float("inf")
log = logging.getLogger("server")


class Variant:
    """One variant. Once `started` is set it has an `error`, or serves at `channel` until it is lost.

    `sessions` counts the sessions that it has and those that wait for it. A Watchdog watches it: it is overdue when it
    has been idle for too long.
    """

    channel: grpc.Channel

    def __init__(
        self, config: Config, flags: frozenset[str], memory: Memory, retire: Callable[["Variant"], None]
    ) -> None:
        self._config, self._flags, self._memory, self._retire = config, flags, memory, retire
        self.sessions, self.idle_since = 0, time.monotonic()
        self.started = threading.Event()
        self.error: SplitlearnError | None = None
        self._server: Server | None = None
        self._ended = threading.Event()

    def start(self, after: "Variant | None") -> None:
        """Start it in the background, once `after` has stopped and released its memory. Returns at once."""
        threading.Thread(target=self._start, args=(after,), daemon=True).start()

    def serves(self) -> bool:
        """Whether it can take sessions."""
        server = self._server
        if server is None or self.error is not None or not self.started.is_set():
            return False
        return server.alive()

    def usable(self) -> bool:
        """Whether it serves or starts."""
        return self.serves() or not self.started.is_set()

    def idle(self) -> bool:
        """Whether no session has it or waits for it."""
        return not self.sessions

    def due_s(self) -> float:
        """When its idle time is over."""
        return NEVER if self.sessions or not self.started.is_set() else self.idle_since + self._config.server.idle_s

    def overdue(self) -> None:
        """Retire it: its idle time is over."""
        self._retire(self)

    def stop(self) -> None:
        """Stop it, even while it starts. Further calls do nothing."""
        self._ended.set()
        if self._server is not None:
            self._server.stop(STOP_TIMEOUT_S)
        if self.started.is_set() and self.error is None:
            self.channel.close()
        self._memory.give_back(self)

    def _start(self, after: "Variant | None") -> None:
        try:
            if after is not None:
                after.stop()
            self._serve(self._memory.take(self))
        except Exception as error:
            self.error = as_error(error, "starting a server for other flags")
            self._memory.give_back(self)
        finally:
            self.idle_since = time.monotonic()
            self.started.set()

    def _serve(self, kv_bytes: int) -> None:
        self._server = server = Server(self._settings(kv_bytes))
        try:
            address = server.wait_ready(self._ended)
        except SplitlearnError as error:
            server.stop()
            log.error("variant failed", extra={"fields": {"error": str(error)}})
            raise TrunkFailed("the server for these flags did not start") from error
        if address is None:  # no session waits for it any more
            server.stop()
            raise TrunkUnavailable("the server for these flags is not needed any more", "draining")
        self.channel = open_channel(address)
        self._memory.loaded(self)

    def _settings(self, kv_bytes: int) -> Config:
        """This server's settings, changed to loopback and these flags."""
        limit = self._config.server.kv_bytes
        changes = {"tls": ServerTls(), "max_variants": 0, "kv_bytes": min(kv_bytes, limit or kv_bytes)}
        own = self._config.server.model_copy(update=changes)
        return serving(self._config.model_copy(update={"server": own}), self._flags)
