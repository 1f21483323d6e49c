"""Trunk servers for other sets of load and process flags than this server's own: the same program, as children.

A session that asks for such a set is proxied, byte for byte, to the child that has it, which is started at the first
one; that costs a second hop on this machine for each step. So the settings of a whole process, its weights and its
memory belong to one set, and a comparison of flags works with a remote trunk, too.

A child takes what this server itself takes. So there are few (`server.max_others`), for those flags that are on offer
(`server.offered_flags`), for no client that nobody knows, and only where there is memory. A child starts while nothing
is locked: whoever asked for it waits as long as they said, and when the last of them has gone, the start is ended.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from itertools import chain

import grpc

from server.build import Served
from server.child import Child
from server.memory import Memory
from server.scheduling.admission import DRAINING
from splitlearn.address import is_loopback
from splitlearn.config import Config
from splitlearn.errors import InputError, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.flags.registry import FLAGS
from splitlearn.runtime.watchdog import Watchdog
from splitlearn.wire import TOKEN_HEADER
from splitlearn.wire.stub import TrunkStub

DROP_TIMEOUT_S = 1.0
LOOK_S = 1.0
SCOPES = ("load", "process")
NOT_BY_DEFAULT = frozenset({"torch_compile"})
"""It keeps all cores busy for minutes, for whoever asks."""


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
    """The children. An idle one makes room for another set of flags, and ends when nobody needs it for `idle_s`.

    Raises InputError for a flag on offer that is none of a whole process.
    """

    def __init__(self, config: Config, served: Served) -> None:
        self._config, self._own = config, served.own_flags
        self._memory = Memory(served)
        self._offered = _offered(config)
        self._lock = threading.Lock()
        self._children: dict[frozenset[str], Child] = {}
        self._watchdog = Watchdog(LOOK_S)
        self._draining = False

    @property
    def sessions(self) -> int:
        """Sessions that are proxied now, or wait for a child."""
        with self._lock:
            return sum(child.sessions for child in self._children.values())

    def why_not(self, flag: str) -> str | None:
        """Why a session cannot have that flag where this server does not have it, or None."""
        own = {text.partition("=")[0] for text in self._own}
        if FLAGS[flag].scope not in SCOPES or flag in own:
            return None
        if not self._config.server.max_others:
            return "this trunk starts no server for other load and process flags (server.max_others)"
        if self._open_to_all():
            return "this trunk knows no clients (server.tokens), and starts no server for other flags for strangers"
        return None if flag in self._offered else "it is not on offer at this trunk (server.offered_flags)"

    def drain(self) -> None:
        """Take nobody on any more."""
        self._draining = True

    def session(
        self,
        flags: frozenset[str],
        first: bytes,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        timeout_s: float,
    ) -> Iterator[bytes]:
        """The whole of a session at the child that has `flags`, ended with the child's own status.

        Raises TrunkRefused for flags that are not on offer, TrunkFull where there is no place, no memory, or no child
        within `timeout_s`.
        """
        child = self._take(flags, context, time.monotonic() + timeout_s)
        try:
            call = TrunkStub(child.channel).session(chain([first], _until_gone(requests)), metadata=_shown(context))
            context.add_callback(lambda: _cancel(call))
            try:
                yield from call
            except grpc.RpcError:
                if context.is_active():
                    context.set_trailing_metadata(call.trailing_metadata() or ())
                    context.abort(call.code(), call.details() or "")
                raise
        finally:
            self._leave(child)

    def drop(self, request: bytes, context: grpc.ServicerContext) -> None:
        """Tell the children that a step is not wanted any more: one of them may have its session."""
        with self._lock:
            children = [child for child in self._children.values() if child.sessions and child.serves()]
        for child in children:
            drop = TrunkStub(child.channel).drop
            with contextlib.suppress(grpc.RpcError):
                drop(request, timeout=DROP_TIMEOUT_S, metadata=_shown(context))

    def stop(self) -> None:
        """End all children, all at the same time."""
        self._draining = True
        with self._lock:
            children = list(self._children.values())
            self._children.clear()
        stops = [threading.Thread(target=child.stop) for child in children]
        for each in stops:
            each.start()
        for each in stops:
            each.join()

    def _take(self, flags: frozenset[str], context: grpc.ServicerContext, deadline: float) -> Child:
        """The child with these flags, which counts one session more. It is waited for outside the lock."""
        self._check(flags)
        child = self._joined(flags)
        try:
            while not child.started.wait(min(LOOK_S / 10, max(0.0, deadline - time.monotonic()))):
                if self._draining or not context.is_active():
                    raise TrunkUnavailable(DRAINING, "draining")
                if time.monotonic() >= deadline:
                    raise TrunkFull("the server for these flags did not start in time", cause="others_full")
            if child.error is not None:
                raise child.error
        except Exception:
            self._leave(child)
            raise
        return child

    def _check(self, flags: frozenset[str]) -> None:
        """Raises TrunkRefused where this set is not on offer."""
        if self._open_to_all():
            said = "it has other load and process flags, and starts no server for others for clients that it"
            raise TrunkRefused(f"{said} does not know (server.tokens, server.tls.client_ca)")
        not_offered = sorted({text.partition("=")[0] for text in flags - self._own} - self._offered)
        if not_offered:
            raise TrunkRefused(f"not on offer at this trunk (server.offered_flags): {', '.join(not_offered)}")

    def _open_to_all(self) -> bool:
        server = self._config.server
        return not (server.tokens or server.tls.client_ca or is_loopback(server.host))

    def _joined(self, flags: frozenset[str]) -> Child:
        """The child that serves or starts, or a new one. Raises TrunkFull."""
        with self._lock:
            if self._draining:
                raise TrunkUnavailable(DRAINING, "draining")
            child = self._children.pop(flags, None)
            if child is not None and child.lost():
                child = None
            if child is None:
                idle = self._make_room()
                child = Child(self._config, flags, self._memory, self._retire)
                child.start(after=idle)
                self._watchdog.watch(child)
            self._children[flags] = child  # at the end: the least recently used one is first
            child.sessions += 1
            return child

    def _make_room(self) -> Child | None:
        """The idle child whose place a new one takes, if one has to go. Raises TrunkFull where none may."""
        limit = self._config.server.max_others
        if len(self._children) < limit:
            return None
        idle = next((flags for flags, child in self._children.items() if child.sessions == 0), None)
        if idle is None:
            said = f"all {limit} places for other sets of load and process flags (server.max_others) are taken"
            raise TrunkFull(said, cause="others_full")
        return self._children.pop(idle)

    def _leave(self, child: Child) -> None:
        """A session less; a child for which nobody waits any more before it serves is ended."""
        with self._lock:
            child.sessions -= 1
            child.idle_since = time.monotonic()
            unwanted = child.sessions == 0 and not child.serves()
            if unwanted:
                self._forget(child)
        if unwanted:
            self._watchdog.drop(child)
            child.stop()

    def _retire(self, child: Child) -> None:
        """It may have been idle for too long."""
        with self._lock:
            needed = child.sessions > 0
            if not needed:
                self._forget(child)
        if needed:
            self._watchdog.watch(child)
        else:
            child.stop()

    def _forget(self, child: Child) -> None:
        for flags in [flags for flags, each in self._children.items() if each is child]:
            del self._children[flags]


def _offered(config: Config) -> frozenset[str]:
    """The names of the flags that sessions may have by way of a child."""
    whole = frozenset(name for name, flag in FLAGS.items() if flag.scope in SCOPES)
    names = config.server.offered_flags
    if names is None:
        return whole - NOT_BY_DEFAULT
    unknown = sorted(set(names) - whole)
    if unknown:
        raise InputError("server.offered_flags", unknown[0], f"names of: {', '.join(sorted(whole))}")
    return frozenset(names)
