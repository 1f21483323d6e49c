"""A model of whole numbers, cut into stages. Each output depends on all tokens so far, and can be computed by hand.

Its trunk runs behind the real client session (client/remote_stage.py), at fake servers. A test decides when they lose a
session, and whether they drop a step in time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch

from splitlearn.client.remote_stage import RemoteSession, RemoteStage
from splitlearn.client.session_stream import Opening, SentStep
from splitlearn.errors import TrunkError, TrunkUnavailable
from splitlearn.events import StageTiming
from splitlearn.stages.base import PendingLogits, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Plain

VOCABULARY, PRIME = 12, 997
BOTTOM, TRUNK, TOP = 3, 5, 7
ROWS = Plain(torch.float32)


def mix(state: int, value: int) -> int:
    """A number that depends on both arguments."""
    return (state * 31 + value * 7 + 3) % PRIME


def layers(salt: int, values: Sequence[int]) -> list[int]:
    """A stage's outputs: each depends on all of `values` up to its position."""
    return list(accumulate(values, mix, initial=salt))[1:]


def head(hidden: int) -> torch.Tensor:
    """The logits [V] of one position."""
    return torch.tensor([(hidden * (29 * token + 131) + 577 * token) % PRIME / 100 for token in range(VOCABULARY)])


def logits(ids: Sequence[int]) -> torch.Tensor:
    """The logits [V] after `ids`, computed by the whole model at once."""
    values: Sequence[int] = ids
    for salt in (BOTTOM, TRUNK, TOP):
        values = layers(salt, values)
    return head(values[-1])


def tensor(values: Sequence[int]) -> torch.Tensor:
    """Hidden states [1, T, 1]."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


@dataclass
class Cache:
    """The inputs of a stage's session so far. `cached` is False for a session that keeps nothing between steps."""

    salt: int
    cached: bool = True
    values: list[int] = field(default_factory=list)

    def step(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """The outputs [1, T, 1] for `x` at `position`."""
        assert 0 <= position <= len(self.values), "a gap"
        assert self.cached or position == 0, "without a cache a step has the whole prefix"
        self.values[position:] = [int(value) for value in x.flatten().tolist()]
        return tensor(layers(self.salt, self.values)[position:])

    def fork(self, other: "Cache", tokens: int) -> None:
        self.values = other.values[:tokens]

    def close(self) -> None:
        """There is nothing to free."""


@dataclass(frozen=True)
class Local:
    """A stage that computes here."""

    salt: int

    def open(self, settings: SessionSettings, max_length: int) -> Cache:
        return Cache(self.salt, settings.new_cache is not None)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        return [StageOutput(item.session.step(item.position, item.x), StageTiming({})) for item in batch]


@dataclass(frozen=True)
class Head:
    """The LM head. Its first part has `first` logits."""

    first: int

    def open(self, settings: SessionSettings, max_length: int) -> Cache:
        return Cache(0)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        return [StageOutput(self._rows(item)[None], StageTiming({})) for item in batch]

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        assert item.logits == 1
        whole = self._rows(item)[None]
        if self.first == VOCABULARY:
            return None
        return PendingLogits(whole[..., : self.first], StageTiming({}), lambda: StageOutput(whole, StageTiming({})))

    def _rows(self, item: StageInput) -> torch.Tensor:
        return torch.stack([head(int(value)) for value in item.x[0, -item.logits :, 0]])


@dataclass
class Server:
    """A trunk's stream. It computes steps in order, when their answers are read."""

    trunks: "Servers"
    cache: Cache
    key: bytes
    address: str = "fake"
    steps: int = 0
    queue: deque[tuple[SentStep, Callable[[], torch.Tensor]]] = field(default_factory=deque)
    dropped: set[int] = field(default_factory=set)
    lost: bool = False
    part: int = 0
    cached_tokens: int = 0

    def address_of(self, part: int) -> str:
        return self.address

    def send(
        self,
        position: int,
        x: torch.Tensor,
        *,
        truncate: bool = False,
        answer_last: int = 0,
        fork_of: bytes = b"",
        uncertain: bool = False,
        rope_length: int = 0,
    ) -> SentStep:
        self.steps += 1
        number, wanted = self.steps, answer_last or x.shape[1]
        if fork_of:
            self.cache.fork(self.trunks.streams[fork_of].cache, position)

        def compute() -> torch.Tensor:
            if number in self.dropped:
                return tensor([])
            assert truncate or position == len(self.cache.values)
            return self.cache.step(position, x)[:, -wanted:]

        sent = SentStep(number, ROWS.to_bytes(x), wanted, 0.0, 0.0, 0.0, 0)
        self.queue.append((sent, compute))
        return sent

    def answer(self, expected: SentStep, wait_s: float, since: float | None = None) -> StageOutput:
        if self.lost or self.trunks.loses():
            self.lost = True
            raise TrunkUnavailable("lost")
        sent, compute = self.queue.popleft()
        assert sent is expected, "answers come in the order of sending"
        return StageOutput(compute(), StageTiming({}))

    def drop_step(self, sent: SentStep) -> None:
        if self.trunks.in_time():
            self.dropped.add(sent.step_id)


@dataclass
class Servers:
    """A fake of failover.Endpoints. At each answer `loses` says whether the trunk is lost. At each drop `in_time`
    says whether the step is not yet computed."""

    loses: Callable[[], bool]
    in_time: Callable[[], bool]
    cached: bool
    streams: dict[bytes, Server] = field(default_factory=dict)

    def budget(self, when_gone: object = None) -> Any:
        return self

    def wait_s(self) -> float:
        return 1.0

    def pause(self) -> None:
        """The next attempt is made at once."""

    def open(self, opening: Opening, budget: Any, *, patient: bool, beside: str = "") -> Server:
        key = str(len(self.streams)).encode()
        self.streams[key] = Server(self, Cache(TRUNK, self.cached), key)
        return self.streams[key]

    def lost(self, stream: Server, error: TrunkUnavailable, budget: Any) -> None:
        assert stream.lost

    def works(self, stream: Server) -> None:
        """There is nothing to record."""

    def end(self, stream: Server) -> None:
        """There is no peak memory to report."""


class Remote(RemoteStage):
    """The client's own remote stage, at fake servers."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.served = cast(Any, _Served())
        self.checks = None
        self.when_gone = None

    def open(self, settings: SessionSettings, max_length: int) -> RemoteSession:
        return RemoteSession(self, cast(Any, self.servers), Opening(b"", ROWS), max_length)

    def open_with(
        self, settings: SessionSettings, max_length: int, count: int, keys: Sequence[bytes]
    ) -> list[RemoteSession]:
        return [self.open(settings, max_length) for _ in range(count)]


@dataclass(frozen=True)
class _Served:
    hidden_size: int = 1
    link: str = ""

    def name(self, error: TrunkError) -> None:
        """A single trunk has no link to name."""


@dataclass
class Text:
    """A fake tokenizer: a prompt is its ids, and the text of an id is a letter."""

    eos_ids: frozenset[int] = frozenset()

    def encode(self, prompt: str, chat: bool | str, tools: object) -> list[int]:
        return [int(word) for word in prompt.split()]

    def readers(self, request: object, prompt: object) -> tuple["Text", None]:
        return self, None

    def feed(self, token: int) -> str:
        return chr(ord("a") + token)

    def flush(self) -> str:
        return ""


def choices(given: Iterator[bool], otherwise: bool) -> Callable[[], bool]:
    """A function that returns the values of `given` in turn, and then always `otherwise`."""
    return lambda: next(given, otherwise)
