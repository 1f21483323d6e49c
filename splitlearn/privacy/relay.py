"""A relay on loopback between a client and its trunk server: it passes every message on, and keeps those of sessions.

    with Relay(trunk_address) as relay:
        ...                                # a client whose trunk is at relay.address
    capture = relay.sessions[-1].capture()

It has what the trunk server's operator has, and the client has no hook for it. It changes nothing: statuses and their
details pass, and so does the client's token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import grpc

from splitlearn.errors import SetupError
from splitlearn.privacy.capture import Capture, capture_of
from splitlearn.wire import TOKEN_HEADER
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.stub import SESSION

HOST = "127.0.0.1"
THREADS = 64
"""The most calls at once: a session takes one for as long as it lasts."""
# Clients ping every 10 s (wire/channel.py), which gRPC would otherwise take for an attack.
_OPTIONS = (("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 5_000))


@dataclass
class RecordedSession:
    """The messages of one session, as bytes, in the order in which they passed."""

    up: list[bytes] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)

    def capture(self) -> Capture:
        """What the trunk server has of it. Raises InputError for a session without a step."""
        return capture_of(self.up, self.down)


class Relay:
    """A relay to the trunk server at `upstream`. Clients connect to `address`. `sessions` has all sessions so far."""

    def __init__(self, upstream: str, credentials: Credentials = NONE) -> None:
        self.sessions: list[RecordedSession] = []
        self._channel = open_channel(upstream, credentials)
        self._server = grpc.server(ThreadPoolExecutor(THREADS), handlers=[_Handler(self)], options=_OPTIONS)
        try:
            port = self._server.add_insecure_port(f"{HOST}:0")
        except RuntimeError as error:
            raise SetupError(f"No port on {HOST} can be had for the relay.") from error
        self.address = f"{HOST}:{port}"

    def __enter__(self) -> Relay:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=0).wait()
        self._channel.close()

    def session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Pass one session's messages on, both ways."""
        recorded = RecordedSession()
        self.sessions.append(recorded)
        method: Any = self._channel.stream_stream(SESSION)
        call = method(_kept(requests, recorded.up), metadata=_token(context))
        context.add_callback(call.cancel)
        try:
            yield from _kept(call, recorded.down)
        except grpc.RpcError as error:
            _abort(context, error)

    def call(self, method: str, request: bytes, context: Any) -> bytes:
        """Pass on a call with one request and one answer."""
        called: Any = self._channel.unary_unary(method)
        try:
            answer: bytes = called(request, metadata=_token(context), timeout=context.time_remaining())
        except grpc.RpcError as error:
            _abort(context, error)
        return answer


class _Handler(grpc.GenericRpcHandler):
    """Hands every call to the relay, with its messages as bytes."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        if details.method == SESSION:
            return grpc.stream_stream_rpc_method_handler(self._relay.session)
        return grpc.unary_unary_rpc_method_handler(partial(self._relay.call, details.method))


def _kept(messages: Iterable[bytes], kept: list[bytes]) -> Iterator[bytes]:
    for message in messages:
        kept.append(message)
        yield message


def _token(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """The client's token, which is all that a trunk server reads of its metadata."""
    return tuple((key, value) for key, value in context.invocation_metadata() if key == TOKEN_HEADER)


def _abort(context: Any, error: Any) -> NoReturn:
    """End a call as the trunk server has ended it."""
    context.set_trailing_metadata(error.trailing_metadata() or ())
    context.abort(error.code(), error.details())
    raise AssertionError  # abort has raised
