"""One address of a trunk: its channels and its circuit breaker."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from splitlearn.client.circuit_breaker import Breaker
from splitlearn.wire.channel import Credentials, open_channel


class Endpoint:
    """Hands out channels, each to one user at a time. A user returns its channel after success, and the next user finds
    it connected. Any thread may use it.

    A channel that failed is closed, never reused: gRPC would back off longer and longer before it reconnects, and
    repeat the old error.
    """

    def __init__(self, address: str, credentials: Credentials, via: str | None = None) -> None:
        self.address = address
        self._via = via
        self.breaker = Breaker()
        self._credentials = credentials
        self._idle: list[grpc.Channel] = []
        self._closed = False
        self._lock = threading.Lock()

    def take(self) -> grpc.Channel:
        """An idle channel, or a new one."""
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        return open_channel(self.address, self._credentials, self._via) if idle is None else idle

    def give_back(self, channel: grpc.Channel) -> None:
        """Return a channel that works to the idle ones."""
        with self._lock:
            if not self._closed:
                self._idle.append(channel)
                return
        channel.close()

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A channel for a `with` block. It is closed if the block raises."""
        channel = self.take()
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        self.give_back(channel)

    def close(self) -> None:
        """Close all idle channels, and those that are returned later."""
        with self._lock:
            self._closed = True
        self.close_idle()

    def close_idle(self) -> None:
        """Close all idle channels."""
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()
