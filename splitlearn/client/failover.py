"""The addresses at which a client may find its trunk: which is tried, when, how often, and what is said if none works.

The first that works is used until it is lost; then the next one in the list, and round again, with pauses that grow
and are random (full jitter), so that many clients of one trunk do not come back at the same moment. An address that
failed several times in a row has its circuit open (client/circuit_breaker.py). One that refuses is not asked again.

That a trunk was lost in the middle of an answer is noticed, and its session replayed, in client/remote_stage.py.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from splitlearn.client.circuit_breaker import Breaker
from splitlearn.client.served import Served
from splitlearn.client.session_stream import Opening, Stream
from splitlearn.errors import TrunkError, TrunkFailed, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import Credentials, open_channel

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LEAST_WAIT_S = 1.0


class Effort:
    """What is tried, within `timeout_s`, to get one thing done: when it must end, and what each address said."""

    def __init__(self, timeout_s: float, addresses: int) -> None:
        self._until = time.monotonic() + timeout_s
        self._addresses = addresses
        self._pauses = 0
        self.errors: dict[str, TrunkError] = {}

    def wait_s(self) -> float:
        """How long an answer is waited for: as long as there is, or half of it where there is another trunk to ask."""
        left = self._until - time.monotonic()
        return left if self._addresses == 1 else max(left / 2, min(left, LEAST_WAIT_S))

    def pause(self, due_s: float = 0.0) -> None:
        """Sleep until the next round: `due_s` and a random time. Raises `error()` if that is too late."""
        pause = due_s + random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._pauses))
        self._pauses += 1
        if time.monotonic() + pause > self._until:
            raise self.error()
        time.sleep(pause)

    def hopeless(self, address: str) -> bool:
        """Whether that trunk answered in a way in which it would again."""
        return isinstance(self.errors.get(address), TrunkRefused | TrunkFailed)

    def error(self) -> TrunkError:
        """What is raised in the end: what each address said last, as the kind that leaves most hope."""
        errors = list(self.errors.values())
        if len(errors) == 1:
            return errors[0]
        hope = (TrunkFull, TrunkUnavailable, TrunkFailed, TrunkRefused)
        kind = next(kind for kind in hope if any(isinstance(error, kind) for error in errors))
        return kind(" ".join(str(error) for error in errors))


@dataclass(frozen=True)
class _Trunk:
    """One address, how it fared, and channels to it whose sessions ended in order: a new session finds one warm.

    Each session has a channel of its own. One that failed is closed: gRPC would wait for longer and longer before it
    connects again, and in between give the old error for the new one.
    """

    address: str
    shown: Credentials
    breaker: Breaker = field(default_factory=Breaker)
    idle: list[grpc.Channel] = field(default_factory=list)

    def open(self, opening: Opening, served: Served, wait_s: float) -> tuple[Stream, pb.Opened]:
        """A session here, and what the trunk said of itself."""
        self.breaker.trying()
        channel = self.idle.pop() if self.idle else open_channel(self.address, self.shown)
        stream = Stream(channel, self.address, served, opening)
        try:
            return stream, stream.open(wait_s)
        except BaseException as error:
            stream.drop()
            if isinstance(error, TrunkUnavailable):
                self.breaker.failed()
            raise

    def resting(self) -> TrunkUnavailable:
        """What is said while nothing is tried."""
        return TrunkUnavailable(
            f"The trunk server at {self.address} failed {self.breaker.failures} times in a row and is not tried again "
            f"for {self.breaker.rest_s():.1f} s."
        )

    def due_s(self, error: TrunkError, patient: bool) -> float | None:
        """In how many seconds to try again after `error`; None for not at all."""
        rest_s = self.breaker.rest_s()
        if isinstance(error, TrunkFull):
            return max(error.retry_s, rest_s)
        return rest_s if isinstance(error, TrunkUnavailable) and (patient or not rest_s) else None


class Trunks:
    """The trunks at `addresses`, of which one is current. `open` gives a session at one that works."""

    def __init__(self, addresses: Sequence[str], served: Served, timeout_s: float, shown: Credentials) -> None:
        self._trunks = {address: _Trunk(address, shown) for address in addresses}
        self._order = deque(addresses)  # the current one is first
        self._served = served
        self._timeout_s = timeout_s
        self._streams: set[Stream] = set()
        self._closed = False

    def effort(self) -> Effort:
        """A new one, for a session's opening or for one step."""
        return Effort(self._timeout_s, len(self._trunks))

    def open(self, opening: Opening, effort: Effort, *, patient: bool) -> tuple[Stream, pb.Opened]:
        """A session at the current trunk or else at the next that gives one, and what that trunk said of itself.

        A `patient` caller has an answer under way and waits, as long as the effort lasts, for a trunk to come back; the
        other one is told as soon as there is none. Either waits for a trunk that says when it will have room.
        """
        while True:
            due: list[float] = []
            for trunk in [self._trunks[address] for address in tuple(self._order) if not effort.hopeless(address)]:
                if self._closed:
                    raise TrunkUnavailable("The connection to the trunk server was closed here.")
                if trunk.breaker.rest_s():
                    effort.errors.setdefault(trunk.address, trunk.resting())
                else:
                    try:
                        found = trunk.open(opening, self._served, effort.wait_s())
                    except TrunkError as error:
                        effort.errors[trunk.address] = error
                    else:
                        self._begin_with(trunk.address)
                        self._streams.add(found[0])
                        return found
                due_s = trunk.due_s(effort.errors[trunk.address], patient)
                due += [] if due_s is None else [due_s]
            if not due:
                raise effort.error()
            effort.pause(min(due))

    def lost(self, stream: Stream, error: TrunkUnavailable, effort: Effort) -> None:
        """A session broke: the next trunk in the list is the current one, if there is another."""
        self._trunks[stream.address].breaker.failed()
        self._begin_with(stream.address)
        self._order.rotate(-1)
        effort.errors[stream.address] = error
        self._streams.discard(stream)
        stream.drop()

    def works(self, stream: Stream) -> None:
        """A step was answered."""
        breaker = self._trunks[stream.address].breaker
        if breaker.failures:
            breaker.succeeded()

    def end(self, stream: Stream) -> int | None:
        """End a session in order: the trunk's peak memory in bytes, None if it does not say it any more."""
        self._streams.discard(stream)
        peak_rss_bytes = stream.close()
        if peak_rss_bytes is not None and not self._closed:
            self._trunks[stream.address].idle.append(stream.channel)
        return peak_rss_bytes

    def close(self) -> None:
        """Close every channel and with it every session."""
        self._closed = True
        for stream in list(self._streams):
            stream.drop()
        for trunk in self._trunks.values():
            while trunk.idle:
                trunk.idle.pop().close()

    def _begin_with(self, address: str) -> None:
        self._order.rotate(-self._order.index(address))
