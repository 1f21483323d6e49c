"""A client without layers: it sends what a client's bottom once gave, and takes little of the machine that the trunk
may run on. Each session is tried once: what a trunk refuses is told, where a real client would ask again.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import suppress

import grpc

from splitlearn.arms.spec import ArmSpec
from splitlearn.arms.worker_main import patience_s
from splitlearn.client.session_stream import Stream, opening_of
from splitlearn.errors import TrunkFull
from splitlearn.flags.registry import settings
from splitlearn.loadtest.plan import Job
from splitlearn.loadtest.recording import Recording
from splitlearn.wire.channel import open_channel

ANSWER_S = 10.0
"""Beyond what the trunk is told that its client waits: what it says when that is over must still arrive."""


class Sender:
    """One connection to the first trunk of `spec`, for one session at a time. Raises TrunkError throughout."""

    def __init__(self, spec: ArmSpec) -> None:
        self._spec, self._served = spec, spec.served()
        self._channel: grpc.Channel | None = None
        self._stream: Stream | None = None
        self._settings = settings(spec.flags.trunk).session
        self.recomputes = self._settings.new_cache is None
        self._patience_s = patience_s(spec)
        self.wait_s = self._patience_s + ANSWER_S

    def open(self, max_length: int) -> Stream:
        """A session, at once or when the trunk has room within the time that its client waits."""
        spec, address = self._spec, self._spec.addresses[0]
        channel, self._channel = self._channel or open_channel(address, spec.credentials), None
        opening = opening_of(self._served, self._settings, max_length, self._patience_s)
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
        """End a session in order; the next one finds the connection warm."""
        if stream.close() is not None:
            self._channel = stream.channel

    def close(self) -> None:
        """Break off whatever there is."""
        if self._stream is not None:
            self._stream.drop()
        if self._channel is not None:
            self._channel.close()


class ReplayClient:
    """Answers requests with recordings, one of each prompt."""

    def __init__(self, spec: ArmSpec, recordings: Sequence[Recording]) -> None:
        self._sender, self._recordings = Sender(spec), recordings

    def warm(self) -> None:
        """Connect, and have the trunk load what the flags ask for."""
        with suppress(TrunkFull):
            self._sender.end(self._sender.open(max_length=1))

    def answer(self, job: Job) -> Generator[float, None, None]:
        """The time at which the trunk's answer for each token was here."""
        recording, sender = self._recordings[job.prompt], self._sender
        stream = sender.open(recording.prompt_tokens + job.new_tokens)
        try:
            for position, x in recording.steps(job.new_tokens, sender.recomputes):
                stream.step(position, x, sender.wait_s)
                yield time.perf_counter()
        finally:
            sender.end(stream)

    def close(self) -> None:
        """Close the connection."""
        self._sender.close()
