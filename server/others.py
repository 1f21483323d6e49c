"""Trunk servers for other sets of load and process flags than this server's own: the same program, as children.

A session that asks for such a set is handed on, byte for byte, to the child that has it, which is started at the first
one; that costs a second hop on this machine for each step. So the settings of a whole process, its weights and its
memory belong to one set, and a comparison of flags works with a remote trunk, too.
"""

import contextlib
import threading
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import grpc

from server.admission import DRAINING
from splitlearn.config import Config, serving
from splitlearn.embedded import EmbeddedTrunk
from splitlearn.errors import TrunkFull, TrunkUnavailable
from splitlearn.wire import SERVICE, TOKEN_HEADER
from splitlearn.wire.channel import open_channel

DROP_TIMEOUT_S = 1.0

if TYPE_CHECKING:  # grpc's classes are generic for the type checker only
    Method = grpc.StreamStreamMultiCallable[bytes, bytes]


class _Child:
    """A running child. `sessions` counts those that are handed on to it."""

    def __init__(self, config: Config) -> None:
        self.trunk = EmbeddedTrunk(config, config.server.tokens)
        self.channel = open_channel(self.trunk.address)
        self.sessions = 0

    def stop(self) -> None:
        """End it."""
        self.channel.close()
        self.trunk.stop()


def _until_gone(requests: Iterator[bytes]) -> Iterator[bytes]:
    """What a client sends, up to its end or its loss: gRPC would log a traceback for the latter."""
    with contextlib.suppress(grpc.RpcError):
        yield from requests


def _shown(context: grpc.ServicerContext) -> tuple[tuple[str, str | bytes], ...]:
    """The token that a client shows."""
    return tuple(pair for pair in context.invocation_metadata() or () if pair[0] == TOKEN_HEADER)


def _cancel(call: grpc.Call) -> None:
    call.cancel()


class Others:
    """The children, at most `server.max_others`. An idle one makes room for another set of flags."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._children: dict[frozenset[str], _Child] = {}
        self._draining = False

    @property
    def sessions(self) -> int:
        """Sessions that are handed on now."""
        with self._lock:
            return sum(child.sessions for child in self._children.values())

    def drain(self) -> None:
        """Hand on nobody any more."""
        self._draining = True

    def session(
        self, flags: frozenset[str], first: bytes, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """The whole of a session at the child that has `flags`, ended with the child's own status. Raises TrunkFull."""
        child = self._take(flags)
        try:
            method: Method = child.channel.stream_stream(f"/{SERVICE}/Session")
            shown = _shown(context)
            # A child's loss is known a moment after its connections are gone: who comes then waits for the next.
            call = method(chain([first], _until_gone(requests)), metadata=shown, wait_for_ready=True)
            context.add_callback(lambda: _cancel(call))
            try:
                yield from call
            except grpc.RpcError:
                if context.is_active():
                    context.set_trailing_metadata(call.trailing_metadata() or ())
                    context.abort(call.code(), call.details() or "")
                raise
        finally:
            with self._lock:
                child.sessions -= 1

    def drop(self, request: bytes, context: grpc.ServicerContext) -> None:
        """Tell the children that a step is not wanted any more: one of them may have its session."""
        with self._lock:
            children = [child for child in self._children.values() if child.sessions]
        for child in children:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = child.channel.unary_unary(f"/{SERVICE}/Drop")
            with contextlib.suppress(grpc.RpcError):
                method(request, timeout=DROP_TIMEOUT_S, metadata=_shown(context))

    def stop(self) -> None:
        """End all children."""
        with self._lock:
            for child in self._children.values():
                child.stop()
            self._children.clear()

    def _take(self, flags: frozenset[str]) -> _Child:
        with self._lock:
            if self._draining:
                raise TrunkUnavailable(DRAINING, "draining")
            child = self._children.pop(flags, None)
            if child is None or not child.trunk.ready():
                self._make_room()
                child = _Child(self._settings(flags))
            self._children[flags] = child  # at the end: the least recently used one is first
            child.sessions += 1
            return child

    def _settings(self, flags: frozenset[str]) -> Config:
        own = self._config.server.model_copy(update={"max_others": 0})
        return serving(self._config.model_copy(update={"server": own}), flags)

    def _make_room(self) -> None:
        limit = self._config.server.max_others
        if len(self._children) < limit:
            return
        idle = next((flags for flags, child in self._children.items() if child.sessions == 0), None)
        if idle is None:
            said = f"all {limit} places for other sets of load and process flags (server.max_others) are taken"
            raise TrunkFull(said, cause="others_full")
        self._children.pop(idle).stop()
