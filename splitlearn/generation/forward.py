"""Ways of a step through the stages: all samples at once, or a long prompt in chunks.

A generation chooses one when it opens; `head_overlap.HeadOverlap` is the third.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from splitlearn.generation.chain import Step
from splitlearn.generation.step_timing import Ledger
from splitlearn.stages.base import LogitsInParts, Stage, StageOutput, WorksAhead

Forward = Callable[[Sequence[Step]], list[torch.Tensor]]
"""Computes for each step the logits [rows, V] of its last positions."""


@dataclass(frozen=True)
class InStep:
    """Calls each stage in turn, with the steps of all samples in one call."""

    stages: Sequence[Stage]
    ledger: Ledger

    def __call__(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        states = [step.ids for step in steps]
        for at, stage in enumerate(self.stages):
            outputs = stage.step([step.item(at, x) for step, x in zip(steps, states, strict=True)])
            states = [self.ledger.noted(step.sample, output) for step, output in zip(steps, outputs, strict=True)]
        return [x[0, -step.rows :] for step, x in zip(steps, states, strict=True)]


@dataclass(frozen=True)
class ChunkedPrefill:
    """Feeds prompts of more than `chunk` tokens in chunks; other steps, as of drafts, go to `otherwise`.

    A remote stage gets the next chunk before its last answer is read. So client and trunk work at the same time.
    """

    stages: Sequence[Stage]
    ledger: Ledger
    chunk: int
    otherwise: Forward

    def __call__(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        if any(step.rows == 1 and step.ids.shape[1] > self.chunk for step in steps):
            return [self._in_chunks(step) for step in steps]
        return self.otherwise(steps)

    def _in_chunks(self, step: Step) -> torch.Tensor:
        chunks = torch.split(step.ids, self.chunk, dim=1)
        steps = [replace(step, position=step.position + at * self.chunk, ids=ids) for at, ids in enumerate(chunks)]
        flowing: Iterable[tuple[Step, torch.Tensor]] = zip(steps, chunks, strict=True)
        for at, stage in enumerate(self.stages):
            if isinstance(stage, LogitsInParts):
                flowing = deque(flowing, maxlen=1)  # only the last chunk's logits are needed
            flowing = self._flow(at, stage, flowing)
        (_, logits) = deque(flowing, maxlen=1)[0]
        return logits[0, -step.rows :]

    def _flow(
        self, at: int, stage: Stage, flowing: Iterable[tuple[Step, torch.Tensor]]
    ) -> Iterator[tuple[Step, torch.Tensor]]:
        """Yield a stage's output for each chunk. A remote stage always has one more chunk than it has answered."""
        if not isinstance(stage, WorksAhead):
            for step, x in flowing:
                yield step, self.ledger.noted(step.sample, stage.step([step.item(at, x)])[0])
            return
        pending: deque[tuple[Step, Callable[[], StageOutput]]] = deque()
        for step, x in flowing:
            begun = stage.begin(step.item(at, x))
            self.ledger.add(step.sample, begun.timing)
            pending.append((step, begun.finish))
            if len(pending) > 1:
                before, finish = pending.popleft()
                yield before, self.ledger.noted(before.sample, finish())
        for step, finish in pending:
            yield step, self.ledger.noted(step.sample, finish())
