"""The gRPC methods of the trunk: Describe, Session, Drop, Metrics."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import grpc
from google.protobuf.message import Message

from server import connections
from server.auth.tls import Security
from server.build import TrunkRuntime
from server.call_log import CallLog, peer
from server.dispatch import CallThreads, Method, unary
from server.ending import Ending
from server.feed import FedSession, Feeds, ProxiedSession
from server.idle_timeout import NEVER, IdleTimeout, WatchedCall
from server.messages import parse
from server.monitoring import gauges
from server.offer import Offer
from server.session_call import SessionCall
from server.session_handler import SessionHandler
from server.variants import Variants
from splitlearn.config import ServerConfig
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.flags.registry import of_scope, settings
from splitlearn.runtime.process import peak_resident_bytes
from splitlearn.scheduling.contract import Client
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import status_of
from splitlearn.wire.stub import DESCRIBE, DROP, METRICS, SESSION

MAX_OPEN_BYTES = 64 * 1024
DEFAULT_TIMEOUT_S = 120.0
"""The timeout of a client that names none."""


class TrunkService:
    """Implements the methods: checks requests and passes sessions to the engine or to a variant. Raises InputError as
    `Offer`."""

    def __init__(self, runtime: TrunkRuntime, variants: Variants, limits: ServerConfig, security: Security) -> None:
        self.counts = runtime.metrics
        self._runtime, self._variants, self._limits, self._access = runtime, variants, limits, security.access
        self._next_servers, self._feeds = security.next_servers, Feeds()
        self._offer = Offer(runtime, variants, limits)
        gauges.connect(runtime, variants, limits)

    def methods(self, brief: CallThreads, sessions: CallThreads) -> dict[str, Method]:
        """The methods by full name, each with its threads."""
        timeout = IdleTimeout(self._limits.open_s, self._limits.open_s)
        answers: dict[str, Callable[[bytes, grpc.ServicerContext], Message]] = {
            DESCRIBE: self._offer.describe,
            METRICS: self.metrics,
            DROP: self.drop,
        }
        unaries = {name: Method(unary(answer), brief, timeout) for name, answer in answers.items()}
        session = Method(self.session, sessions, IdleTimeout(self._limits.open_s, self._limits.idle_s))
        return {**unaries, SESSION: session}

    def metrics(self, request: bytes, context: grpc.ServicerContext) -> pb.MetricsText:
        """The metrics, in Prometheus' text format."""
        return pb.MetricsText(text=self.counts.text())

    def drop(self, request: bytes, context: grpc.ServicerContext) -> pb.DropReply:
        """Drop a step. An unknown key has no effect and gets the same answer, so that no key can be guessed."""
        drop = connections.parse(pb.DropRequest, request, context)
        if not self._runtime.engine.drop(drop.key, drop.step_id):
            self._variants.drop(request, context)
        return pb.DropReply()

    def session(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, watched: WatchedCall
    ) -> Iterator[bytes]:
        """One session, from Open to the end of the stream. Its memory is freed however it ends."""
        log = CallLog(self.counts, context)
        watched.timed_out = log.timed_out
        context.add_callback(log.end)
        try:
            quota = self._access.quota(context)
            call = SessionCall(context, watched, log, quota, log.received(watched.requests(requests)))
            yield from log.sent(self._answers(call))
        except SplitlearnError as error:
            log.refused(error)
            context.abort_with_status(status_of(error))
        except grpc.RpcError:
            pass  # the client has gone
        finally:
            log.end()

    def _answers(self, call: SessionCall) -> Iterator[bytes]:
        first = next(call.requests, None)
        if first is None:
            return
        if len(first) > MAX_OPEN_BYTES:
            raise InputError("message", f"{len(first)} bytes", f"an Open of at most {MAX_OPEN_BYTES}")
        message = parse(first, "open", "feed")
        if message.WhichOneof("kind") == "feed":
            self._feeds.claim(message.feed, call).run(call)
            return  # without an answer
        opening = message.open
        flags = self._offer.flags(opening)
        self._next_servers.check(opening)
        timeout_s = min(opening.timeout_s or DEFAULT_TIMEOUT_S, self._limits.max_wait_s)
        server_flags = of_scope(flags, "load", "process")
        if server_flags == self._runtime.own_flags:
            yield from self._own(call, flags, opening, timeout_s)
        else:
            answers = self._proxied(call, server_flags, first, timeout_s, opening.batch)
            yield from self._found_by_feed(answers, call, server_flags, timeout_s) if opening.fed else answers

    def _proxied(
        self, call: SessionCall, flags: frozenset[str], first: bytes, timeout_s: float, batch: bool
    ) -> Iterator[bytes]:
        """A session at a variant. It counts here, too, but has its KV memory there."""
        admission = self._runtime.admission
        reservation = admission.acquire(0, timeout_s, call.context.add_callback, call.quota.holder, batch)
        try:
            answers = self._variants.session(flags, first, call.requests, call.context, timeout_s)
            yield from call.log.proxied(answers)
        finally:
            admission.release(reservation)

    def _found_by_feed(
        self, answers: Iterator[bytes], call: SessionCall, flags: frozenset[str], timeout_s: float
    ) -> Iterator[bytes]:
        """Let the session with these `answers`, which is at the variant with `flags`, be found there by its feed."""
        call.watched.wait_for(NEVER)  # the variant has the same limits
        opened = next(answers)
        key = pb.ServerMessage.FromString(opened).opened.key
        session = self._feeds.add(ProxiedSession(key, partial(self._variants.session, flags), timeout_s))
        try:
            yield opened
            yield from answers
        finally:
            self._feeds.end(session)

    def _own(self, call: SessionCall, flags: frozenset[str], opening: pb.Open, timeout_s: float) -> Iterator[bytes]:
        """A session at this server's own engine."""
        runtime, began = self._runtime, time.perf_counter()
        client = Client(timeout_s, call.quota.holder, call.context.add_callback, opening.batch)
        session = runtime.engine.open(settings(flags).session, opening.max_length, client)
        ending = Ending(partial(runtime.engine.close, session), self._next_servers, self._feeds, session.key)
        # If the stream ends while this generator waits at a yield, only the callback runs in time.
        if not call.context.add_callback(ending.at_once):
            ending.at_once()
            return
        try:
            waited_s = time.perf_counter() - began
            keeper = self._keeper(call)
            cached = runtime.prefixes.begin(session, keeper, opening.prefix_keys)
            handler = SessionHandler(runtime, self._next_servers, session, call, opening, keeper)
            if opening.fed:
                ending.fed = self._feeds.add(FedSession(call, handler, session.key, timeout_s, self._limits.idle_s))
            call.log.opened(waited_s)
            yield self._opened(waited_s, session.key, cached)
            for raw in call.requests:
                yield from handler.take(raw)
                call.watched.in_parts = not opening.fed and handler.parts is not None
            if handler.done:
                ending.done()
            closed = pb.Closed(peak_rss_bytes=peak_resident_bytes())
            yield pb.ServerMessage(closed=closed).SerializeToString()
        finally:
            ending.at_last()

    def _keeper(self, call: SessionCall) -> str:
        """Whose prefixes a session may reuse: its token's; without tokens, those of clients at its address. They have
        secrets of their own, without which no key of another client's block can be made."""
        return call.quota.holder if self._limits.tokens else f"address {peer(call.context)}"

    def _opened(self, queue_s: float, key: bytes, cached: int) -> bytes:
        opened = pb.Opened(
            threads=self._runtime.threads,
            load_s=self._runtime.load_s,
            import_rss_bytes=self._runtime.import_rss_bytes,
            queue_s=queue_s,
            max_tensor_bytes=self._offer.part_bytes,
            key=key,
            cached_tokens=cached,
        )
        return pb.ServerMessage(opened=opened).SerializeToString()
