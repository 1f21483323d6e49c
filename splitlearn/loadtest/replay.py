"""A client without layers: it sends recorded hidden states, and leaves the machine to the trunk.

It tries each session once, so that every refusal is counted; a real client would ask again.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

import grpc

from splitlearn.arms.spec import ArmSpec
from splitlearn.arms.worker_main import step_timeout_s
from splitlearn.client.session_stream import Stream, opening_of
from splitlearn.errors import TrunkFull
from splitlearn.flags.registry import settings
from splitlearn.loadtest.clients import Answer
from splitlearn.loadtest.plan import LoadRequest
from splitlearn.loadtest.recording import Recording
from splitlearn.wire.channel import open_channel

ANSWER_S = 10.0
"""Added to the timeout that the trunk is told, so that its last message can still arrive."""


class Sender:
    """One connection to the first trunk of `spec`, for one session at a time. Methods raise TrunkError."""

    def __init__(self, spec: ArmSpec) -> None:
        self._spec, self._served = spec, spec.served()
        self._channel: grpc.Channel | None = None
        self._address = ""
        self._stream: Stream | None = None
        self._settings = settings(spec.flags.trunk).session
        self.use_cache = self._settings.new_cache is not None
        self._step_timeout_s = step_timeout_s(spec)
        self.wait_s = self._step_timeout_s + ANSWER_S

    def open(self, max_length: int) -> Stream:
        """Open a session; waits for room at the trunk for as long as its client waits."""
        (hop,) = self._spec.hops
        address, via = hop.listed()[0], hop.via[0] if hop.via else None
        if self._channel is not None and address != self._address:
            self._channel.close()
            self._channel = None
        self._address = address
        channel, self._channel = self._channel or open_channel(address, hop.credentials, via), None
        opening = opening_of(self._served, self._settings, max_length, self._step_timeout_s)
        stream = self._stream = Stream(channel, address, self._served, opening)
        try:
            stream.open(self.wait_s)
        except TrunkFull:
            stream.leave()
            self._channel = channel
            raise
        except BaseException:
            stream.drop()
            raise
        return stream

    def end(self, stream: Stream) -> None:
        """End a session in order and keep its connection for the next one."""
        if stream.close() is not None:
            self._channel = stream.channel

    def close(self) -> None:
        """Break off the session and the connection."""
        if self._stream is not None:
            self._stream.drop()
        if self._channel is not None:
            self._channel.close()


class ReplayClient:
    """Answers requests by replaying recordings, one of each prompt."""

    def __init__(self, spec: ArmSpec, recordings: Sequence[Recording]) -> None:
        self._sender, self._recordings = Sender(spec), recordings

    def warm(self) -> None:
        """Connect, and let the trunk load what the flags ask for."""
        with suppress(TrunkFull):
            self._sender.end(self._sender.open(max_length=1))

    def answer(self, job: LoadRequest) -> Answer:
        """Yield the time at which the trunk's answer for each token arrived."""
        recording, sender = self._recordings[job.prompt], self._sender
        stream = sender.open(recording.prompt_tokens + job.new_tokens)
        try:
            for position, x in recording.steps(job.new_tokens, sender.use_cache):
                stream.step(position, x, sender.wait_s)
                yield time.perf_counter()
        finally:
            sender.end(stream)

    def close(self) -> None:
        """Close the connection."""
        self._sender.close()
