"""A chain of trunk servers that forward: the client opens a session at each, and sends steps to the first one alone.

Each server sends its answers to the next one, and the last one answers the client. So a token takes one trip more than
there are servers, in the place of two for each. `ForwardingChain` and `ChainStream` stand for all of them in the place
of `Endpoints` and `Stream` (client/remote_stage.py). When a server is lost, all sessions are opened again and the
client replays what it had sent to the first one.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from splitlearn.client.failover import Endpoints, RetryBudget
from splitlearn.client.hop import Hop
from splitlearn.client.served import ServedModel, TrunkFacts
from splitlearn.client.session_stream import Opening, SentStep, Stream
from splitlearn.errors import InputError, TrunkError, TrunkUnavailable
from splitlearn.scheduling.contract import WhenGone
from splitlearn.stages.base import StageOutput
from splitlearn.wire import MAX_HOPS, NEXT_SERVER, SERVER_BEFORE

SETTLE_S = 0.5
"""How long to look at the other streams for the reason, once the chain has ended: all of them end together."""
POLL_S = 0.01
BETWEEN = ", "
ADVICE = " With trunk.forward: false the client passes each answer on itself."


class ChainStream:
    """A session at each server of a chain, as one stream. Methods raise TrunkError, which names the server's link."""

    def __init__(self, streams: Sequence[Stream], served: Sequence[ServedModel]) -> None:
        self.streams = streams
        self.key = streams[0].key
        self.lost: int | None = None
        """The number of the server that was lost, where that is known."""
        self._served = served
        kept = [each.cached_tokens for each in streams]
        self.cached_tokens, self._uneven = min(kept), len(set(kept)) > 1
        self._closing = False
        streams[-1].chain = [(each.plan.start, each.plan.end) for each in served]
        for stream, following in zip(streams, streams[1:], strict=False):
            stream.forward(following)
            stream.when_over(self._stream_over)

    @property
    def address(self) -> str:
        """Of all servers."""
        return BETWEEN.join(each.address for each in self.streams)

    @property
    def part(self) -> int:
        """The number of the server that was lost, 0 where that is not known."""
        return self.lost or 0

    def address_of(self, part: int) -> str:
        """The address of that server."""
        return self.streams[part].address

    def send(self, position: int, x: torch.Tensor, *, truncate: bool = False, **others: Any) -> SentStep:
        """Send a step, as `Stream.send`. Servers that had kept different lengths of a prefix go back to the least."""
        truncate, self._uneven = truncate or self._uneven, False
        return self.streams[0].send(position, x, truncate=truncate, **others)

    def answer(self, sent: SentStep, wait_s: float, since: float | None = None) -> StageOutput:
        """Wait for the last server's answer to `sent`, as `Stream.answer`."""
        try:
            return self.streams[-1].answer(sent, wait_s, since)
        except TrunkUnavailable as error:
            raise self._reason(error) from error
        except TrunkError as error:
            self._served[-1].name(error)
            raise

    def keep(self, keys: Sequence[bytes]) -> None:
        """Ask every server to keep what the session has of these blocks. It must be the last message."""
        for stream in self.streams:
            stream.keep(keys)

    def drop_step(self, sent: SentStep) -> None:
        """Drop `sent` at every server."""
        for stream in self.streams:
            stream.drop_step(sent)

    def close(self) -> None:
        """Tell every server that no more steps come. Their streams have to be closed."""
        self._closing = True
        for stream in self.streams:
            stream.say_done()

    def drop(self) -> None:
        """Cancel all streams."""
        self._closing = True
        for stream in self.streams:
            stream.drop()

    def _stream_over(self) -> None:
        """A server that does not answer the client has ended its stream: nothing comes from the last one any more."""
        if not self._closing:
            self.streams[-1].interrupt()

    def _reason(self, error: TrunkUnavailable) -> TrunkError:
        """The error of the stream that tells most. All of them end soon, if one of the servers was lost."""
        until = time.monotonic() + SETTLE_S
        while True:
            found = [stream.failure() for stream in self.streams]
            worse = [at for at, each in enumerate(found) if each and not isinstance(each[0], TrunkUnavailable)]
            self.lost = worse[-1] if worse else _lost_at([None if each is None else each[1] for each in found])
            if self.lost is not None or None not in found or time.monotonic() > until:
                break
            time.sleep(POLL_S)
        told = found[self.lost] if self.lost is not None else None
        # The lost one's own stream may have been interrupted: then another server says why.
        told = told or next((each for each in found if each is not None), None)
        reason = error if told is None else told[0]
        if self.lost is not None:
            self._served[self.lost].name(reason)
        if _unlisted(reason):
            reason.args = (f"{reason}.{ADVICE}",)
        return reason


def _lost_at(words: Sequence[str | None]) -> int | None:
    """The number of the lost server, by the words with which each stream ended. A server says how far behind it the
    lost one is; a stream without such words broke itself."""
    for at, each in enumerate(words):
        if each is not None and NEXT_SERVER not in each and SERVER_BEFORE not in each:
            return at
    for at, each in enumerate(words):
        if each is not None and NEXT_SERVER in each:
            return min(at + each.count(NEXT_SERVER), len(words) - 1)
    return None


class ForwardingChain:
    """The servers that `hops` lead to, as one trunk that serves `whole`. Each has its failover list."""

    change = False
    """Their addresses stay the same."""

    def __init__(self, hops: Sequence[Hop], whole: ServedModel, timeout_s: float) -> None:
        if len(hops) > MAX_HOPS:
            raise InputError("trunk.forward", True, f"false for a chain of more than {MAX_HOPS} links")
        self._served = [hop.of(whole) for hop in hops]
        self._counts = [len(hop.addresses) for hop in hops]
        self._addresses = [*(hop.addresses for hop in hops), ()]
        self._timeout_s = timeout_s
        self._servers = [
            Endpoints(hop.addresses, served, timeout_s, hop.credentials, hop.via)
            for hop, served in zip(hops, self._served, strict=True)
        ]

    def budget(self, when_gone: WhenGone | None = None) -> RetryBudget:
        """A new budget, for one step or for the opening of a session, which ends `when_gone` says so."""
        return RetryBudget(self._timeout_s, max(self._counts), when_gone)

    @property
    def facts(self) -> Sequence[TrunkFacts]:
        """What each server has sent last of itself."""
        return [each for servers in self._servers for each in servers.facts]

    def open(self, opening: Opening, budget: RetryBudget, *, patient: bool, beside: str = "") -> ChainStream:
        """Open a session at every server at the same time, as `Endpoints.open`."""
        first = beside.split(BETWEEN) if beside else [""] * len(self._servers)
        with ThreadPoolExecutor(len(first)) as threads:
            opening_all = [
                threads.submit(self._open_at, at, opening, budget, patient, each) for at, each in enumerate(first)
            ]
            wait(opening_all)
        errors = [error for each in opening_all if (error := each.exception()) is not None]
        if errors:
            for servers, each in zip(self._servers, opening_all, strict=True):
                if each.exception() is None:
                    servers.leave(each.result())
            raise min(errors, key=_unlisted)  # an address that is wrong is listed nowhere: the first other error counts
        return ChainStream([each.result() for each in opening_all], self._served)

    def lost(self, stream: ChainStream, error: TrunkUnavailable, budget: RetryBudget) -> None:
        """Drop a broken session. The server that was lost is tried last at its link; each, if none is known."""
        for at, (servers, each) in enumerate(zip(self._servers, stream.streams, strict=True)):
            if stream.lost in (None, at):
                servers.lost(each, error, budget.part(at, self._counts[at]))
            else:
                servers.leave(each)
        budget.errors[stream.address_of(stream.part)] = error
        stream.drop()

    def works(self, stream: ChainStream) -> None:
        """Record an answered step: all addresses work."""
        for servers, each in zip(self._servers, stream.streams, strict=True):
            servers.works(each)

    def end(self, stream: ChainStream) -> None:
        """End a session in order."""
        stream.close()
        for servers, each in zip(self._servers, stream.streams, strict=True):
            servers.end(each)

    def close(self) -> None:
        """Close every channel, and with it every session."""
        for servers in self._servers:
            servers.close()

    def _open_at(self, at: int, opening: Opening, budget: RetryBudget, patient: bool, beside: str) -> Stream:
        served = self._served[at]
        own = opening.part(served.plan, self._addresses[at + 1], fed=at > 0)
        try:
            return self._servers[at].open(own, budget.part(at, self._counts[at]), patient=patient, beside=beside)
        except TrunkError as error:
            served.name(error)
            if _unlisted(error):
                error.args = (f"{error}.{ADVICE}",)
            raise


def _unlisted(error: BaseException) -> bool:
    """Whether a server said that it may not forward to another."""
    return "server.forward_to" in str(error)
