"""Local stages whose sessions share forwards, for many decode loops of one process, each in a thread of its own.

    batching = Batching.of(chain, settings, kv_bytes=None, setting="api.kv_bytes")     # once
    stages = batching.stages(client)          # for one request: each satisfies the protocols of stages/base.py

Each stage has an engine, as a trunk server has one for its layers.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

from splitlearn.kvcache.layers import reserved
from splitlearn.kvcache.pool import KVPool
from splitlearn.kvcache.prefix_store import BlockPart
from splitlearn.scheduling.admission import Admission
from splitlearn.scheduling.calibration import calibrate, calibrate_head
from splitlearn.scheduling.contract import Client
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.room import pools
from splitlearn.scheduling.scheduler import WHOLE, Limits
from splitlearn.scheduling.sessions import EngineSession
from splitlearn.stages.base import PendingLogits, Session, Stage, StageInput, StageOutput, WholePrefix
from splitlearn.stages.head import Head
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class BatchedSession:
    """A session at an engine."""

    engine: Engine
    own: EngineSession

    def fork(self, other: "BatchedSession", tokens: int) -> None:
        self.engine.fork(self.own, other.own.key, tokens)

    def close(self) -> None:
        """Free the session's memory, now or after the forward that uses it."""
        self.engine.close(self.own)

    @property
    def most_blocks(self) -> int:
        return self.own.local.most_blocks

    def write_blocks(self, parts: Sequence[BlockPart]) -> None:
        self.engine.begin_with(self.own, parts)

    def keep_blocks(self, keys: Sequence[bytes], first: int) -> Sequence[BlockPart]:
        return self.engine.blocks_of(self.own, keys, first)


class BatchedHeadSession(BatchedSession, WholePrefix):
    """A session at the LM head's engine. There is nothing to copy or to free."""

    def fork(self, other: BatchedSession, tokens: int) -> None:
        """There is nothing to copy."""


@dataclass(frozen=True)
class BatchedStage:
    """A stage for the sessions of one client. `stage` computes their steps, `engine` decides when."""

    stage: LocalStage | Head
    engine: Engine
    client: Client
    session: ClassVar[type[BatchedSession]] = BatchedSession

    @property
    def rope_restart(self) -> int | None:
        return None if isinstance(self.stage, Head) else self.stage.rope_restart

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        return self.open_together(settings, max_length, 1)[0]

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> Sequence[Session]:
        """Open `count` sessions; waits for room for all of them. Only those with reserved caches, and those without
        any, share forwards."""
        pooled = self.engine.limits.shared and settings.new_cache in (None, reserved)
        opened = self.engine.open_together(settings, max_length, count, self.client, pooled=pooled)
        return [self.session(self.engine, each) for each in opened]

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """Compute one step of each session, in forwards that other clients' sessions share."""
        steps = [(item.session.own, replace(item, session=item.session.own.local)) for item in batch]
        return [self.engine.step(*steps[0], truncate=True)] if len(steps) == 1 else self.engine.step_together(steps)


class BatchedHead(BatchedStage):
    """The LM head for the sessions of one client."""

    session = BatchedHeadSession

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """None: a product of many sessions is not divided."""
        return None


@dataclass(frozen=True)
class Batching:
    """The engines of a chain of local stages, in its order."""

    engines: Sequence[tuple[LocalStage | Head, Engine]]

    @classmethod
    def of(
        cls, chain: Sequence[LocalStage | Head], settings: SessionSettings, kv_bytes: int | None, setting: str
    ) -> "Batching":
        """The engines for sessions with `settings`. `kv_bytes` limits their KV memory, None to a share of what is free;
        `setting` is the name of that limit.

        Measures how long forwards take. Each stage waits for others as long as a token takes through all of them: a
        group that has come apart between two stages comes together again at the next.
        """
        packing = [stage for stage in chain if isinstance(stage, LocalStage) and stage.packs(settings)]
        room = dict(zip(map(id, packing), pools(packing, kv_bytes, BLOCK_TOKENS, setting), strict=True))
        limits = [_limits(stage, settings, id(stage) in room) for stage in chain]
        token_s = sum(each.gather_s for each in limits)
        together = [replace(each, gather_s=token_s) if each.gather_s else each for each in limits]
        pairs = zip(chain, together, strict=True)
        return cls([(stage, _engine(stage, own, room.get(id(stage)), setting)) for stage, own in pairs])

    def stages(self, client: Client) -> list[Stage]:
        """The chain for the sessions of `client`."""
        return [
            (BatchedHead if isinstance(stage, Head) else BatchedStage)(stage, engine, client)
            for stage, engine in self.engines
        ]


def _limits(stage: LocalStage | Head, settings: SessionSettings, shared: bool) -> Limits:
    """The limits of a forward, which takes one session at a time unless it is `shared`."""
    if isinstance(stage, Head):
        return calibrate_head(stage, settings)
    return calibrate(stage, settings, None) if shared else Limits(False, prompt_tokens=WHOLE, alone_tokens=WHOLE)


def _engine(stage: LocalStage | Head, limits: Limits, pool: KVPool | None, setting: str) -> Engine:
    """An engine with a thread of its own."""
    nothing = KVPool((), 1, 1, stage.dtype, stage.eager.device)
    admission = Admission(pool or nothing, sys.maxsize, sys.maxsize, setting)
    return Engine(stage, admission, limits, lambda *_: None, ThreadPoolExecutor(1, f"{stage.label} engine"))
