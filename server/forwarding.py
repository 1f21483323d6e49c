"""In a chain of trunks a server sends a session's answers to the next server, as steps on a stream of their own.

The client opens the session there itself and names it by its key; this server shows its own credentials. It connects
only to addresses of its settings (`server.forward_to`).
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

import grpc

from splitlearn.address import Address
from splitlearn.client.endpoint import Endpoint
from splitlearn.config import ForwardConfig
from splitlearn.errors import SplitlearnError, TrunkDenied, TrunkError, TrunkForgot, TrunkRefused, TrunkUnavailable
from splitlearn.wire import NEXT_SERVER, PROTOCOL
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import credentials, open_channel
from splitlearn.wire.status import error_class
from splitlearn.wire.stub import TrunkStub

QUEUED_MESSAGES = 8
"""Messages to the next server that wait until it takes them. Each is at most MAX_MESSAGE_BYTES long."""
CLOSE_TIMEOUT_S = 2.0
CAUSE = "next_server"
_HARMLESS = (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
Fail = Callable[[SplitlearnError], None]
"""Ends a session's call with an error, from any thread."""


class NextServers:
    """The servers to which sessions may forward. Raises InputError for settings that cannot be used."""

    def __init__(self, settings: ForwardConfig) -> None:
        shown = credentials(settings, "server.forward_to")
        for address in settings.addresses:
            open_channel(address, shown).close()  # raises if the token would go over a network in plaintext
        self._endpoints = {address: Endpoint(address, shown) for address in settings.addresses}
        self._streams: dict[bytes, ForwardStream] = {}
        self._lock = threading.Lock()

    def check(self, opening: pb.Open) -> None:
        """Raise TrunkRefused if the session may forward to a server that is not listed, also if it has not to yet."""
        if opening.forwards and not self._endpoints:
            raise TrunkRefused("this trunk forwards to no other (server.forward_to)", "forward")
        missing = [each for each in opening.forward_to if self._endpoint(each) is None]
        if missing:
            raise _not_listed(*missing)

    def open(self, own_key: bytes, forward: pb.Forward, timeout_s: float, fail: Fail) -> "ForwardStream":
        """The stream for the session with `own_key`. `fail` is called once it is lost. A next server that takes no step
        for `timeout_s` counts as lost. Raises TrunkRefused for an address that is not listed."""
        endpoint = self._endpoint(forward.address)
        if endpoint is None:
            raise _not_listed(forward.address)
        stream = ForwardStream(endpoint.address, endpoint.take(), forward, timeout_s, fail)
        with self._lock:
            self._streams[own_key] = stream
        return stream

    def fork_of(self, own_key: bytes, address: str) -> bytes:
        """The key at the next server, `address`, of the session that has `own_key` here. Raises TrunkForgot."""
        with self._lock:
            stream = self._streams.get(own_key)
        if stream is None or stream.address != address:
            raise TrunkForgot("the session to fork has no part at the next server of the chain", "branch_lost")
        return stream.key

    def close(self, own_key: bytes, *, done: bool) -> None:
        """End the session's stream, if it has one: in order, if the session is `done`. Waits for that at most
        CLOSE_TIMEOUT_S."""
        with self._lock:
            stream = self._streams.pop(own_key, None)
        if stream is None:
            return
        if done and stream.end():
            self._endpoints[stream.address].give_back(stream.channel)
        else:
            stream.cancel()
            stream.channel.close()

    def stop(self) -> None:
        """Close what is connected."""
        for endpoint in self._endpoints.values():
            endpoint.close()

    def _endpoint(self, address: str) -> Endpoint | None:
        try:
            return self._endpoints.get(str(Address.parse(address)))
        except ValueError:
            return None

    def cancel(self, own_key: bytes) -> None:
        """Cancel the session's stream, if it has one, without waiting. `close` has to follow."""
        with self._lock:
            stream = self._streams.get(own_key)
        if stream is not None:
            stream.cancel()


def _not_listed(*addresses: str) -> TrunkRefused:
    named = " and ".join(map(repr, addresses))
    return TrunkRefused(f"this trunk does not forward to {named} (server.forward_to)", "forward")


class ForwardStream:
    """One session's steps on their way to the server at `address`, where the session has `key`. Alone on `channel`."""

    def __init__(self, address: str, channel: grpc.Channel, forward: pb.Forward, timeout_s: float, fail: Fail) -> None:
        self.address, self.channel, self.key = address, channel, forward.key
        self.part_bytes = forward.max_tensor_bytes
        self._timeout_s, self._fail = timeout_s, fail
        self._name = f"{NEXT_SERVER}{address}"
        self._outgoing: Queue[bytes | None] = Queue(QUEUED_MESSAGES)
        self._over = threading.Event()
        feed = pb.Feed(protocol=PROTOCOL, key=forward.key)
        self._outgoing.put(pb.ClientMessage(feed=feed).SerializeToString())
        call: Any = TrunkStub(channel).session(iter(self._outgoing.get, None))
        self._call = call
        call.add_done_callback(self._ended)

    def send(self, messages: Iterable[bytes]) -> None:
        """Send messages. Raises TrunkUnavailable if the next server is lost, or takes none within the timeout."""
        for message in messages:
            try:
                if not self._over.is_set():
                    self._outgoing.put(message, timeout=self._timeout_s)
            except Full:
                late = f"{self._name}, has taken no message for {self._timeout_s:g} s"
                raise TrunkUnavailable(late, CAUSE) from None
            if self._over.is_set():
                raise TrunkUnavailable(f"{self._name}, has ended its part of the session", CAUSE)

    def end(self) -> bool:
        """End the stream after its last message. Returns whether the next server has ended it in order, too."""
        with suppress(Full):
            self._outgoing.put_nowait(pb.ClientMessage(done=pb.Done()).SerializeToString())
            self._outgoing.put_nowait(None)
            self._over.wait(CLOSE_TIMEOUT_S)
        return self._over.is_set() and self._call.code() is grpc.StatusCode.OK

    def cancel(self) -> None:
        """Cancel the stream, without waiting."""
        self._call.cancel()

    def _ended(self, call: Any) -> None:
        """Called by gRPC when the call has ended, however that was. A stream that ended in order, or because its
        session there did, ends nothing here: a session's streams are closed one after the other."""
        self._over.set()
        with suppress(Empty):  # frees a thread in `send`
            while True:
                self._outgoing.get_nowait()
        with suppress(Full):  # frees gRPC's thread, if that waits for a message
            self._outgoing.put_nowait(None)
        if call.code() not in _HARMLESS:
            self._fail(self._error(call))

    def _error(self, call: Any) -> TrunkError:
        kind = error_class(call.code())
        message = f"{self._name}: {call.details() or call.code().name}"
        if issubclass(kind, TrunkDenied):  # to the client that would say that its own token is wrong
            return TrunkRefused(f"{message} (server.forward_to.token)", CAUSE)
        error = kind(message)
        error.cause = CAUSE
        return error
