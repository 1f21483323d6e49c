"""How a session ends: its memory is freed, and its streams from and to other servers of a chain end with it."""

from collections.abc import Callable
from dataclasses import dataclass

from server.feed import FedSession, Feeds
from server.forwarding import NextServers


@dataclass
class Ending:
    """The end of the session with `key`. `free` frees its memory; further calls of it do nothing. `fed`: it has or
    awaits a feed."""

    free: Callable[[], None]
    next_servers: NextServers
    feeds: Feeds
    key: bytes
    fed: FedSession | None = None
    _done: bool = False

    def done(self) -> None:
        """The client has said that nothing follows: the other streams end in order, too."""
        self._done = True
        if self.fed is not None:
            self.fed.done = True

    def at_once(self) -> None:
        """The call has ended. Does not wait, since gRPC's own thread calls it."""
        self._free()
        if not self._done:
            self.next_servers.cancel(self.key)

    def at_last(self) -> None:
        """The session's own thread is done with it."""
        self._free()
        self.next_servers.close(self.key, done=self._done)

    def _free(self) -> None:
        if self.fed is not None:
            self.feeds.end(self.fed)
        self.free()
