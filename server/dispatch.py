"""Decides which calls get a thread and which are refused, before anything of a call is read.

grpc-python gives each call a thread from a single pool. A client that sends no message holds that thread for as long as
it likes. Here gRPC's own thread, which never blocks, checks each call first:

- A call without a valid token is refused at once and takes no thread, unless it is a health check.
- Each token, and each connection without one, has a limit of concurrent calls.
- Sessions, health checks and other calls have separate threads (`CallThreads`). If all are taken, the call that has
  waited longest for its first message is ended.

Each call that gets a thread has a deadline for its first message (`IdleTimeout`).
"""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from server.auth.gate import Access, Caller
from server.call_log import peer
from server.idle_timeout import IdleTimeout, Send, WatchedCall
from server.monitoring import logs
from server.monitoring.metrics import Metrics, cause_of
from splitlearn.access.quota import DENIED
from splitlearn.errors import InputError, SplitlearnError, TrunkDenied, TrunkFull
from splitlearn.wire.status import code_of, status_of

log = logging.getLogger(__name__)
MAX_ENDING = 1_000
"""Limit on ended calls that still hold their thread. A thread notices the end within milliseconds."""

Behavior = Callable[[Iterator[bytes], grpc.ServicerContext, WatchedCall], Iterator[bytes]]


@dataclass(frozen=True)
class Method:
    """A gRPC method: its behavior, its threads and its timeouts. `open`: calls need no token."""

    behavior: Behavior
    threads: "CallThreads"
    timeout: IdleTimeout
    open: bool = False


def unary(answer: Callable[[bytes, grpc.ServicerContext], Message]) -> Behavior:
    """The behavior of a unary method. On the wire its message and its answer are streams of one."""

    def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, call: WatchedCall) -> Iterator[bytes]:
        message = next(call.requests(requests), None)
        if message is None:
            context.abort_with_status(status_of(InputError("message", "none", "one message")))
        yield answer(message, context).SerializeToString()

    return behavior


class CallThreads:
    """A pool of `size` threads. Each runs one call at a time, from start to end.

    torch is single-threaded in them: only the engine's thread leads parallel work (see `build`).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, initializer=_compute_alone)
        self._lock = threading.Lock()
        self._calls: dict[WatchedCall, None] = {}
        self._ending = 0

    def run(self, call: WatchedCall, work: Callable[[], None]) -> None:
        """Run `work`, which serves `call`, on a thread. Raises TrunkFull if opened calls hold all threads."""
        with self._lock:
            oldest = None
            if len(self._calls) >= self.size:
                oldest = next((each for each in self._calls if not each.opened), None)
                if oldest is None or self._ending >= MAX_ENDING:
                    message = f"{self.size} calls of this kind are open; try again later"
                    raise TrunkFull(message, cause="calls_full")
                del self._calls[oldest]
                self._ending += 1
            self._calls[call] = None
        if oldest is not None:
            oldest.give_up()
        self._pool.submit(self._run, call, work)

    def _run(self, call: WatchedCall, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                if call in self._calls:
                    del self._calls[call]
                else:
                    self._ending -= 1


def _compute_alone() -> None:
    """Make torch single-threaded in this thread, in a process that has torch: the directory's has not."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


class Dispatch(grpc.GenericRpcHandler):
    """Routes calls to methods by full name. Without a valid token, every method but an open one answers the same."""

    def __init__(self, methods: dict[str, Method], access: Access, metrics: Metrics) -> None:
        self._access, self._metrics = access, metrics
        self._callers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._handlers = {name: self._handler(method) for name, method in methods.items()}
        self._unknown = self._handler(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method. A method that does not exist has one, too."""
        return self._handlers.get(handler_call_details.method, self._unknown)

    def _handler(self, method: Method | None) -> "grpc.RpcMethodHandler[Any, Any]":
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
            try:
                self._begin(method, requests, context, send)
            except SplitlearnError as error:
                self._refused(context, cause_of(error), code_of(error).name)
                context.abort_with_status(status_of(error))

        # gRPC passes `send` to such a behavior, and the call continues after the behavior returns.
        behavior.experimental_non_blocking = True  # type: ignore[attr-defined]
        behavior.experimental_thread_pool = _CallingThread()  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(behavior)

    def _begin(
        self, method: Method | None, requests: Iterator[bytes], context: grpc.ServicerContext, send: Send
    ) -> None:
        """Find a thread for a call. Runs on gRPC's own thread, which must not wait."""
        caller = self._access.caller(context)
        if not caller.known and (method is None or not method.open):
            raise TrunkDenied(DENIED)
        if method is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self._count(caller)
        call = method.timeout.watch(context, lambda cause: self._refused(context, cause), send)

        def work() -> None:
            try:
                _answer(method.behavior(requests, context, call), context, call, send)
            finally:
                self._uncount(caller)

        try:
            method.threads.run(call, work)
        except TrunkFull:
            self._uncount(caller)
            raise

    def _count(self, caller: Caller) -> None:
        with self._lock:
            if caller.limit is not None and self._callers[caller.key] >= caller.limit:
                message = f"{caller.limit} calls of this client are open; try again later"
                raise TrunkFull(message, cause="calls_full")
            self._callers[caller.key] += 1

    def _uncount(self, caller: Caller) -> None:
        with self._lock:
            self._callers[caller.key] -= 1
            if not self._callers[caller.key]:
                del self._callers[caller.key]

    def _refused(self, context: grpc.ServicerContext, cause: str, code: str = "") -> None:
        self._metrics.refused(cause, code)
        logs.refused(log, peer=peer(context), cause=cause, code=code or "DEADLINE_EXCEEDED")


class _CallingThread(ThreadPoolExecutor):
    """Runs work at once on the submitting thread, gRPC's own. A ThreadPoolExecutor, since gRPC accepts nothing else."""

    def __init__(self) -> None:
        super().__init__(1)  # no thread starts before the base class's `submit`, which is never called

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Run `fn` now."""
        done: Future[Any] = Future()
        done.set_result(fn(*arguments, **named))
        return done


def _answer(answers: Iterator[bytes], context: grpc.ServicerContext, call: WatchedCall, send: Send) -> None:
    """Send all answers, then the status that the behavior set."""
    try:
        for answer in answers:
            call.send(answer)
            if not context.is_active():
                return
    except grpc.RpcError:
        return  # the client went away
    except Exception as error:
        # A behavior that refused the call has set a code: context.abort raises a plain Exception.
        if context.code() is None:  # type: ignore[attr-defined]
            logs.failed(log, "call failed", error, peer=peer(context))
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details(f"Exception while answering: {type(error).__name__}")
    send(None)
