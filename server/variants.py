"""Variants: trunk servers for other sets of load and process flags, each a child process that runs this program.

A session that asks for such a set is proxied, byte for byte, to its variant. The first such session starts the variant.
Each step takes a second hop on this machine. So a process has one set of flags, and a comparison of flags works with a
remote trunk, too.

A variant takes as much memory as this server. So there are few (`server.max_variants`), only for offered flags
(`server.offered_flags`), only for known clients, and only if there is memory. A variant starts outside the lock: its
clients wait within their own timeouts. When the last of them has gone, the start is cancelled.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from itertools import chain

import grpc

from server.build import TrunkRuntime
from server.memory import Memory
from server.variant import Variant
from splitlearn.address import is_loopback
from splitlearn.config import Config
from splitlearn.errors import InputError, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.flags.registry import FLAGS
from splitlearn.runtime.process_pool import ProcessPool, stop_all
from splitlearn.runtime.watchdog import Watchdog
from splitlearn.scheduling.admission import DRAINING
from splitlearn.wire import TOKEN_HEADER
from splitlearn.wire.stub import TrunkStub

DROP_TIMEOUT_S = 1.0
LOOK_S = 1.0
SCOPES = ("load", "process")
NOT_BY_DEFAULT = frozenset({"torch_compile"})
"""It keeps all cores busy for minutes."""


def _until_gone(requests: Iterator[bytes]) -> Iterator[bytes]:
    """A client's messages until it ends or is lost. gRPC would log a traceback for a lost client."""
    with contextlib.suppress(grpc.RpcError):
        yield from requests


def _token(context: grpc.ServicerContext) -> tuple[tuple[str, str | bytes], ...]:
    """The part of a call's metadata that has the client's token."""
    return tuple(pair for pair in context.invocation_metadata() or () if pair[0] == TOKEN_HEADER)


def _cancel(call: grpc.Call) -> None:
    call.cancel()


class Variants:
    """The variants of this server. An idle one is replaced when another set of flags needs its place, and ends after
    `idle_s`. Raises InputError for an offered flag that is neither a load nor a process flag."""

    def __init__(self, config: Config, runtime: TrunkRuntime) -> None:
        self._config, self._own = config, runtime.own_flags
        self._memory = Memory(runtime)
        self._offered = _offered(config)
        self._lock = threading.Lock()
        self._pool = ProcessPool[frozenset[str], Variant](lambda count: count < config.server.max_variants)
        self._watchdog = Watchdog(LOOK_S)
        self._draining = False

    @property
    def sessions(self) -> int:
        """Sessions that are proxied or wait for a variant."""
        with self._lock:
            return sum(variant.sessions for variant in self._pool)

    def why_not(self, flag: str) -> str | None:
        """Why a flag other than this server's own is unavailable, or None."""
        own = {text.partition("=")[0] for text in self._own}
        if FLAGS[flag].scope not in SCOPES or flag in own:
            return None
        offered = flag in self._offered
        return self._why_none() or (None if offered else "it is not on offer at this trunk (server.offered_flags)")

    def _why_none(self) -> str | None:
        """Why there are no variants at all, or None."""
        server = self._config.server
        if not server.max_variants:
            return "this trunk starts no server for other load and process flags (server.max_variants)"
        if server.tokens or server.tls.client_ca or is_loopback(server.host):
            return None
        return "this trunk starts no server for strangers: set server.tokens or server.tls.client_ca"

    def drain(self) -> None:
        """Refuse new sessions."""
        self._draining = True

    def session(
        self,
        flags: frozenset[str],
        first: bytes,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        timeout_s: float,
    ) -> Iterator[bytes]:
        """Proxy a whole session to the variant with `flags`. It ends with the variant's own status.

        Raises TrunkRefused for flags that are not on offer. Raises TrunkFull if there is no place or memory, or if the
        variant does not start within `timeout_s`.
        """
        variant = self._take(flags, context, time.monotonic() + timeout_s)
        try:
            call = TrunkStub(variant.channel).session(chain([first], _until_gone(requests)), metadata=_token(context))
            context.add_callback(lambda: _cancel(call))
            try:
                yield from call
            except grpc.RpcError:
                if context.is_active():
                    context.set_trailing_metadata(call.trailing_metadata() or ())
                    context.abort(call.code(), call.details() or "")
                raise
        finally:
            self._leave(variant)

    def drop(self, request: bytes, context: grpc.ServicerContext) -> None:
        """Pass a Drop request on to all variants: one of them may have the session."""
        with self._lock:
            variants = [variant for variant in self._pool if variant.sessions and variant.serves()]
        for variant in variants:
            drop = TrunkStub(variant.channel).drop
            with contextlib.suppress(grpc.RpcError):
                drop(request, timeout=DROP_TIMEOUT_S, metadata=_token(context))

    def stop(self) -> None:
        """Stop all variants at the same time."""
        self._draining = True
        with self._lock:
            variants = self._pool.clear()
        stop_all([variant.stop for variant in variants])

    def _take(self, flags: frozenset[str], context: grpc.ServicerContext, deadline: float) -> Variant:
        """Join the variant with these flags, and wait outside the lock until it serves."""
        self._check(flags)
        variant = self._joined(flags)
        try:
            while not variant.started.wait(min(LOOK_S / 10, max(0.0, deadline - time.monotonic()))):
                if self._draining or not context.is_active():
                    raise TrunkUnavailable(DRAINING, "draining")
                if time.monotonic() >= deadline:
                    raise TrunkFull("the server for these flags did not start in time", cause="variants_full")
            if variant.error is not None:
                raise variant.error
        except Exception:
            self._leave(variant)
            raise
        return variant

    def _check(self, flags: frozenset[str]) -> None:
        """Raise TrunkRefused if this set of flags is not on offer."""
        names = sorted({text.partition("=")[0] for text in flags - self._own} - self._offered)
        reason = self._why_none()
        if reason or names:
            raise TrunkRefused(reason or f"not on offer at this trunk (server.offered_flags): {', '.join(names)}")

    def _joined(self, flags: frozenset[str]) -> Variant:
        """The variant with these flags, new if there is none, with one session more. Raises TrunkFull."""
        with self._lock:
            if self._draining:
                raise TrunkUnavailable(DRAINING, "draining")
            variant = self._pool.get(flags)
            if variant is None:
                evicted = None if self._pool.has_room() else self._evicted_locked()
                variant = Variant(self._config, flags, self._memory, self._retire)
                variant.start(after=evicted)
                self._watchdog.watch(variant)
                self._pool.add(flags, variant)
            variant.sessions += 1
            return variant

    def _evicted_locked(self) -> Variant:
        """The idle variant that a new one replaces. Raises TrunkFull if none is idle."""
        evicted = self._pool.evict()
        if evicted is None:
            limit = self._config.server.max_variants
            message = f"all {limit} places for other sets of load and process flags (server.max_variants) are taken"
            raise TrunkFull(message, cause="variants_full")
        return evicted

    def _leave(self, variant: Variant) -> None:
        """Count one session less. A variant without sessions that does not serve yet is stopped."""
        with self._lock:
            variant.sessions -= 1
            variant.idle_since = time.monotonic()
            unneeded = variant.idle() and not variant.serves()
            if unneeded:
                self._pool.remove(variant)
        if unneeded:
            self._watchdog.drop(variant)
            variant.stop()

    def _retire(self, variant: Variant) -> None:
        """Stop a variant that has been idle for too long, unless a session came meanwhile."""
        with self._lock:
            idle = variant.idle()
            if idle:
                self._pool.remove(variant)
        if idle:
            variant.stop()
        else:
            self._watchdog.watch(variant)


def _offered(config: Config) -> frozenset[str]:
    """The names of the flags that a variant may have."""
    possible = frozenset(name for name, flag in FLAGS.items() if flag.scope in SCOPES)
    names = config.server.offered_flags
    if names is None:
        return possible - NOT_BY_DEFAULT
    unknown = sorted(set(names) - possible)
    if unknown:
        raise InputError("server.offered_flags", unknown[0], f"names of: {', '.join(sorted(possible))}")
    return frozenset(names)
