"""The gRPC face of the trunk: checks what comes in, hands steps to the engine, says clearly what it refuses."""

import time
from collections.abc import Callable, Iterator

import grpc
import torch
from google.protobuf.message import DecodeError, Message

from server.auth.gate import Access, Guest
from server.build import Served
from server.call_log import Visit
from server.dispatch import Method, Threads, unary
from server.idle_timeout import Call, Patience
from server.monitoring import gauges
from server.session_handler import Stay, parse
from server.variants import Others
from splitlearn.config import ServerConfig
from splitlearn.errors import InputError, SplitlearnError, TrunkRefused
from splitlearn.flags.here import here
from splitlearn.flags.registry import FLAGS, of_scope
from splitlearn.flags.selection import applied_of, chosen_in, why_not
from splitlearn.runtime import hardware
from splitlearn.runtime.process import peak_resident_bytes
from splitlearn.wire import ENVELOPE_BYTES, MAX_TENSOR_BYTES, PROTOCOL
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import status_of
from splitlearn.wire.stub import DESCRIBE, DROP, METRICS, SESSION

MAX_OPEN_BYTES = 64 * 1024
DEFAULT_WAIT_S = 120.0
"""How long a client waits that does not say."""


class TrunkService:
    """Describe and Session. Raises InputError for a limit on messages into which no step fits."""

    def __init__(self, served: Served, others: Others, limits: ServerConfig, access: Access) -> None:
        self._served = served
        self.counted = served.metrics
        self._others = others
        self._limits = limits
        self._access = access
        self._part_bytes = min(MAX_TENSOR_BYTES, limits.max_message_bytes - ENVELOPE_BYTES)
        row = served.files.facts.hidden_size * served.placement.dtype.itemsize
        if self._part_bytes < row:
            least = f"at least {row + ENVELOPE_BYTES}, for the hidden state of one token"
            raise InputError("server.max_message_bytes", limits.max_message_bytes, least)
        self._place = here(str(served.placement.device), _name(served.placement.dtype))
        self._machine = {name: str(value) for name, value in hardware.describe().items() if value is not None}
        gauges.connect(served, others, limits)

    def methods(self, threads: Threads, sessions: Threads) -> dict[str, Method]:
        """All methods by their full names: Session, and on other threads what is answered at once."""
        brief = Patience(self._limits.open_s, self._limits.open_s)
        answers: dict[str, Callable[[bytes, grpc.ServicerContext], Message]] = {
            DESCRIBE: self.describe,
            METRICS: self.metrics,
            DROP: self.drop,
        }
        unaries = {name: Method(unary(answer), threads, brief) for name, answer in answers.items()}
        session = Method(self.session, sessions, Patience(self._limits.open_s, self._limits.idle_s))
        return {**unaries, SESSION: session}

    def describe(self, request: bytes, context: grpc.ServicerContext) -> pb.Description:
        """What is served here, and which flags can be applied. A request says nothing, so that none can be wrong."""
        served, facts = self._served, self._served.files.facts
        return pb.Description(
            protocol=PROTOCOL,
            model=served.files.name,
            digest=served.files.digest,
            start=served.plan.start,
            end=served.plan.end,
            n_layers=served.plan.n_layers,
            dtype=_name(served.placement.dtype),
            device=str(served.placement.device),
            hidden_size=facts.hidden_size,
            max_length=self._longest() or 0,
            threads=served.threads,
            flags=[pb.FlagState(name=name, unavailable=self._why_not(name) or "") for name in FLAGS],
            machine=self._machine,
        )

    def metrics(self, request: bytes, context: grpc.ServicerContext) -> pb.MetricsText:
        """How this server is."""
        return pb.MetricsText(text=self._served.metrics.text())

    def drop(self, request: bytes, context: grpc.ServicerContext) -> pb.DropReply:
        """A step is not wanted any more. A key of no session has no effect and the same answer: none can be guessed."""
        try:
            asked = pb.DropRequest.FromString(request)
        except DecodeError:
            error = InputError("message", f"{len(request)} bytes", "a serialized splitlearn.v1.DropRequest")
            context.abort_with_status(status_of(error))
        if not self._served.engine.drop(asked.key, asked.step_id):
            self._others.drop(request, context)
        return pb.DropReply()

    def session(self, requests: Iterator[bytes], context: grpc.ServicerContext, call: Call) -> Iterator[bytes]:
        """One session, from Open to the end of the stream; whatever ends it, its memory is freed."""
        visit = Visit(self._served.metrics, context)
        call.late = visit.silent
        context.add_callback(visit.over)
        try:
            guest = self._access.enter(context)
            requests = visit.received(call.requests(requests))
            yield from visit.sent(self._session(requests, context, guest, visit, call))
        except SplitlearnError as error:
            visit.refused(error)
            context.abort_with_status(status_of(error))
        except grpc.RpcError:
            pass  # the client went away
        finally:
            visit.over()

    def _session(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, guest: Guest, visit: Visit, call: Call
    ) -> Iterator[bytes]:
        first = next(requests, None)
        if first is None:
            return
        if len(first) > MAX_OPEN_BYTES:
            raise InputError("message", f"{len(first)} bytes", f"an Open of at most {MAX_OPEN_BYTES}")
        opening = parse(first, "open").open
        self._check(opening)
        applied = self._applied(opening)
        flags = of_scope(applied, "load", "process")
        began, timeout_s = time.perf_counter(), min(opening.timeout_s or DEFAULT_WAIT_S, self._limits.max_wait_s)
        if flags != self._served.own_flags:
            admission = self._served.admission
            holder = self._access.caller(context).key
            # It counts, and has its KV memory elsewhere.
            place = admission.enter(0, timeout_s, context.add_callback, holder)
            try:
                yield from visit.handed_on(self._others.session(flags, first, requests, context, timeout_s))
            finally:
                admission.leave(place)
            return
        holder = self._access.caller(context).key
        seat = self._served.engine.open(applied, opening.max_length, timeout_s, context.add_callback, holder)
        stay = Stay(self._served, seat, guest, visit, opening.max_length, timeout_s)
        # The stream can end while this generator waits at a yield: then only the callback runs in time.
        if not context.add_callback(stay.close):
            stay.close()
            return
        try:
            waited_s = time.perf_counter() - began
            visit.opened(waited_s)
            yield self._opened(waited_s, seat.key)
            for raw in requests:
                yield from stay.feed(raw)
                call.in_parts = stay.in_parts
            closed = pb.Closed(peak_rss_bytes=peak_resident_bytes())
            yield pb.ServerMessage(closed=closed).SerializeToString()
        finally:
            stay.close()

    def _opened(self, queue_s: float, key: bytes) -> bytes:
        served = self._served
        opened = pb.Opened(
            threads=served.threads,
            load_s=served.load_s,
            import_rss_bytes=served.import_rss_bytes,
            queue_s=queue_s,
            max_tensor_bytes=self._part_bytes,
            key=key,
        )
        return pb.ServerMessage(opened=opened).SerializeToString()

    def _check(self, opening: pb.Open) -> None:
        """Refuse what does not match what is served, naming all that differs."""
        served, plan = self._served, self._served.plan
        differing = [
            f"{what} is {ours}, not {theirs!r}"
            for what, theirs, ours in (
                ("protocol", opening.protocol, PROTOCOL),
                ("model", opening.model, served.files.name),
                ("digest", opening.digest, served.files.digest),
                ("layer range", (opening.start, opening.end, opening.n_layers), (plan.start, plan.end, plan.n_layers)),
                ("dtype", opening.dtype, _name(served.placement.dtype)),
            )
            if theirs != ours
        ]
        if differing:
            raise TrunkRefused(f"this trunk serves something else: {'; '.join(differing)}")
        limit = self._longest()
        if opening.max_length < 1 or (limit is not None and opening.max_length > limit):
            raise InputError("max_length", opening.max_length, f"1 to {limit or 'any number of'} tokens")
        if not 0 <= opening.timeout_s < float("inf"):
            raise InputError("timeout_s", opening.timeout_s, "seconds, 0 or more")

    def _longest(self) -> int | None:
        """The most tokens of a session that the model and the settings allow; None where neither says."""
        limits = (self._served.files.facts.context_length, self._limits.max_length)
        return min((limit for limit in limits if limit is not None), default=None)

    def _why_not(self, flag: str) -> str | None:
        """Why no session can have that flag here, or None."""
        return why_not(flag, "trunk", self._place) or self._others.why_not(flag)

    def _applied(self, opening: pb.Open) -> frozenset[str]:
        """The flags of a session, in the words by which they are compared. Refuses what cannot be applied here."""
        chosen = chosen_in(opening.flags)
        for name in chosen:
            reason = why_not(name, "trunk", self._place)
            if reason:
                raise TrunkRefused(f"flag {name} is unavailable at this trunk: {reason}")
        return applied_of(chosen)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
