"""Which calls get a thread, and which are refused before: decided when a call comes, before anything of it is read.

grpc-python gives each call a thread of its one pool, and the thread then waits for the call's message, for as long as
the client likes and whoever it is. Here a call is first looked at by gRPC's own thread, which waits for nothing:

- without a valid token it is refused there and then, and takes no thread, unless it asks for health;
- each token, and each connection that shows none, has so many calls at once and no more;
- sessions and all other calls have threads apart (`Threads`), so many for each; where all are taken, the call that has
  waited longest for its first message gives its place up.

Whatever gets a thread has a deadline for its first message (`Patience`).
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from google.protobuf.message import Message

from server.auth.gate import DENIED, Access, Caller
from server.call_log import peer
from server.idle_timeout import Call, Patience
from server.monitoring import logs
from server.monitoring.metrics import Metrics, cause_of
from splitlearn.errors import InputError, SplitlearnError, TrunkDenied, TrunkFull
from splitlearn.wire.status import code_of, status_of

log = logging.getLogger(__name__)
MOST_ENDING = 1_000
"""Calls that were ended and are not off their threads yet, which is a matter of milliseconds."""

Behavior = Callable[[Iterator[bytes], grpc.ServicerContext, Call], Iterator[bytes]]
Send = Callable[[bytes | None], None]


@dataclass(frozen=True)
class Method:
    """What answers a method's calls, on which threads, and how long it waits for messages; whether somebody without a
    token may call it, too."""

    behavior: Behavior
    threads: "Threads"
    patience: Patience
    open: bool = False


def unary(answer: Callable[[bytes, grpc.ServicerContext], Message]) -> Behavior:
    """The behavior of a method with one message and one answer: on the wire a stream of one is the same."""

    def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, call: Call) -> Iterator[bytes]:
        message = next(call.requests(requests), None)
        if message is None:
            context.abort_with_status(status_of(InputError("message", "none", "one")))
        yield answer(message, context).SerializeToString()

    return behavior


class Threads:
    """`places` threads, each for one call from its beginning to its end.

    They compute on one thread each, and lead no team of threads beside the engine's (build()).
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._pool = ThreadPoolExecutor(places, initializer=torch.set_num_threads, initargs=(1,))
        self._lock = threading.Lock()
        self._calls: dict[Call, None] = {}
        self._ending = 0

    def run(self, call: Call, work: Callable[[], None]) -> None:
        """Do `work`, of `call`, on one of them. Raises TrunkFull where all are taken by calls that have begun."""
        with self._lock:
            waiting = None
            if len(self._calls) >= self.places:
                waiting = next((each for each in self._calls if not each.opened), None)
                if waiting is None or self._ending >= MOST_ENDING:
                    said = f"{self.places} calls of this kind are under way; try again later"
                    raise TrunkFull(said, cause="calls_full")
                del self._calls[waiting]
                self._ending += 1
            self._calls[call] = None
        if waiting is not None:
            waiting.give_up()
        self._pool.submit(self._run, call, work)

    def _run(self, call: Call, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                if call in self._calls:
                    del self._calls[call]
                else:
                    self._ending -= 1


class Dispatch(grpc.GenericRpcHandler):
    """All methods of a server, by their full names. Without a valid token there is one answer for all but open ones."""

    def __init__(self, methods: dict[str, Method], access: Access, metrics: Metrics) -> None:
        self._access, self._metrics = access, metrics
        self._callers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._handlers = {name: self._handler(method) for name, method in methods.items()}
        self._unknown = self._handler(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """The method's handler; there is one for methods that do not exist, too."""
        return self._handlers.get(handler_call_details.method, self._unknown)

    def _handler(self, method: Method | None) -> "grpc.RpcMethodHandler[Any, Any]":
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
            try:
                self._begin(method, requests, context, send)
            except SplitlearnError as error:
                self._refused(context, cause_of(error), code_of(error).name)
                context.abort_with_status(status_of(error))

        # gRPC calls such a behavior with `send`, and is done with it when it returns: the call goes on.
        behavior.experimental_non_blocking = True  # type: ignore[attr-defined]
        behavior.experimental_thread_pool = _Here()  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(behavior)

    def _begin(
        self, method: Method | None, requests: Iterator[bytes], context: grpc.ServicerContext, send: Send
    ) -> None:
        """Find a thread for a call. It runs on gRPC's own thread, which must not wait."""
        caller = self._access.caller(context)
        if not caller.known and (method is None or not method.open):
            raise TrunkDenied(DENIED)
        if method is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self._enter(caller)
        call = method.patience.watch(context, lambda cause: self._refused(context, cause))

        def work() -> None:
            try:
                _answer(call.answers(method.behavior(requests, context, call)), context, send)
            finally:
                self._leave(caller)

        try:
            method.threads.run(call, work)
        except TrunkFull:
            self._leave(caller)
            raise

    def _enter(self, caller: Caller) -> None:
        with self._lock:
            if caller.limit is not None and self._callers[caller.key] >= caller.limit:
                said = f"{caller.limit} calls of this client are under way; try again later"
                raise TrunkFull(said, cause="calls_full")
            self._callers[caller.key] += 1

    def _leave(self, caller: Caller) -> None:
        with self._lock:
            self._callers[caller.key] -= 1
            if not self._callers[caller.key]:
                del self._callers[caller.key]

    def _refused(self, context: grpc.ServicerContext, cause: str, code: str = "") -> None:
        self._metrics.refused(cause, code)
        logs.refused(log, peer=peer(context), cause=cause, code=code or "DEADLINE_EXCEEDED")


class _Here(ThreadPoolExecutor):
    """No pool: what is submitted is done at once, by the thread that submits it. It is gRPC's, which takes no other."""

    def __init__(self) -> None:
        super().__init__(1)  # threads start with the first work that waits for one, of which there is none

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Do it."""
        done: Future[Any] = Future()
        done.set_result(fn(*arguments, **named))
        return done


def _answer(answers: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
    """Send all answers, and then the status that the behavior has set."""
    try:
        for answer in answers:
            send(answer)
            if not context.is_active():
                return
    except grpc.RpcError:
        return  # the client went away
    except Exception as error:
        # A behavior that refuses has set a code: context.abort raises no more than Exception.
        if context.code() is None:  # type: ignore[attr-defined]
            logs.failed(log, "call failed", error, peer=peer(context))
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details(f"Exception while answering: {type(error).__name__}")
    send(None)
