"""Feeds: in a chain of trunks the server before sends a session's steps here, on a stream of its own.

Such a session has two calls. Its client's, which opened it, gets the answers, unless they are forwarded. The feed names
the session by its key, and computes its steps in its own thread. When one of them is lost, the other one ends.
"""

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from server.idle_timeout import NEVER
from server.session_call import SessionCall
from server.session_handler import SessionHandler
from splitlearn.errors import SplitlearnError, TrunkForgot, TrunkRefused, TrunkUnavailable
from splitlearn.runtime import private_apis
from splitlearn.wire import PROTOCOL, SERVER_BEFORE
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import code_of, shorten

LOST = f"{SERVER_BEFORE}ended the session's feed, or was lost"
OVER = "the session that this stream feeds has ended"


class FedSession:
    """A session that has `key`, and has or awaits its feed. `own` is its client's call. `over`: the session has ended;
    `done`: in order. `failed`: the feed has, which ends with its own error."""

    def __init__(self, own: SessionCall, handler: SessionHandler, key: bytes, timeout_s: float, idle_s: float) -> None:
        self.key = key
        self.feed: SessionCall | None = None
        self.over, self.done, self.failed = False, False, False
        self._own, self._handler, self._timeout_s, self._idle_s = own, handler, timeout_s, idle_s
        own.watched.wait_for(timeout_s, f"{SERVER_BEFORE}sent no feed within {timeout_s:g} s")

    def run(self, feed: SessionCall) -> None:
        """Compute the steps of `feed` until it ends. Raises as `SessionHandler`, and RpcError if the feed is lost."""
        own = self._own
        own.watched.wait_for(NEVER)
        try:
            self._handler.await_forward(self._timeout_s)
            for raw in feed.requests:
                for answer in own.log.sent(self._handler.take_fed(raw)):
                    own.watched.send(answer)
                feed.watched.in_parts = self._handler.parts is not None
            if not self._handler.fed_in_full:
                raise TrunkUnavailable(LOST, "feed_lost")
        except SplitlearnError as error:
            self._fail(error)
            raise
        except grpc.RpcError:
            self._fail(TrunkUnavailable(LOST, "feed_lost"))
            raise
        own.watched.wait_for(self._idle_s)

    def end_feed(self) -> None:
        """End the feed, since the session has ended. It is told what has ended that."""
        if self.feed is None or self.failed or not self.feed.context.is_active():
            return
        code = grpc.StatusCode.CANCELLED if self.done else grpc.StatusCode.UNAVAILABLE
        error = self._own.error
        why = (code, OVER) if error is None else (code_of(error), shorten(str(error)))
        private_apis.end_call(self.feed.context, *why)

    def _fail(self, error: SplitlearnError) -> None:
        """End the client's call with `error`, unless the session's end was the cause."""
        self.failed = True
        if not self.over:
            self._own.fail(error)


class ProxiedSession:
    """A session that has `key` at a variant, and has or awaits its feed. `proxy` proxies a stream to the variant, which
    ends both of the session's streams."""

    def __init__(self, key: bytes, proxy: Callable[..., Iterator[bytes]], timeout_s: float) -> None:
        self.key = key
        self.feed: SessionCall | None = None
        self.over = False
        self._proxy, self._timeout_s = proxy, timeout_s

    def run(self, feed: SessionCall) -> None:
        """Proxy `feed` until it ends. Raises as `Variants.session`."""
        first = pb.ClientMessage(feed=pb.Feed(protocol=PROTOCOL, key=self.key)).SerializeToString()
        for _ in self._proxy(first, feed.requests, feed.context, self._timeout_s):
            pass

    def end_feed(self) -> None:
        """Does nothing: the variant does it."""


Fed = TypeVar("Fed", FedSession, ProxiedSession)


class Feeds:
    """The sessions that have or await a feed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: list[FedSession | ProxiedSession] = []

    def add(self, session: Fed) -> Fed:
        """Let `session` be found by its feed."""
        with self._lock:
            self._sessions.append(session)
        return session

    def claim(self, message: pb.Feed, feed: SessionCall) -> FedSession | ProxiedSession:
        """The session that `message` names, for its only feed. Raises TrunkForgot if there is none, TrunkRefused if it
        has a feed. Comparisons take constant time, so that their time reveals nothing."""
        if message.protocol != PROTOCOL:
            raise TrunkRefused(f"this trunk's protocol is {PROTOCOL}, not {message.protocol}")
        with self._lock:
            found = next((each for each in self._sessions if secrets.compare_digest(each.key, message.key)), None)
            if found is None:
                raise TrunkForgot("the session to feed does not exist or has ended", "feed")
            if found.feed is not None:
                raise TrunkRefused("the session to feed has a feed already", "feed")
            found.feed = feed
            return found

    def end(self, session: FedSession | ProxiedSession) -> None:
        """The session has ended: end its feed, too. Further calls do nothing."""
        with self._lock:
            already, session.over = session.over, True
            if not already:
                self._sessions.remove(session)
        if not already:
            session.end_feed()
