"""The steps of an equivalence test through a chain of stages, and the chains themselves."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from splitlearn.models.cut import CutModel, body_of, carve, forward
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import rope_restart, structure_of
from splitlearn.stages.equivalence.judge import TOTAL
from splitlearn.stages.equivalence.tiny import CONTEXT, SCALE_FLOOR

SHORT, LONG = SCALE_FLOOR, CONTEXT + 2
"""Tokens of a prompt below every boundary, and of one beyond every boundary."""


@dataclass(frozen=True)
class Script:
    """How a text goes through the stages. Each of `ends` ends a step; those within the `prompt` tokens end its chunks.
    Without a cache each step is the whole prefix at position 0."""

    name: str
    prompt: int
    ends: tuple[int, ...]
    cached: bool = True


SCRIPTS = (
    Script("one by one", SHORT, (*range(SHORT, TOTAL),)),
    Script("three at once", SHORT, (SHORT, *range(SHORT + 3, TOTAL, 3), TOTAL - 1)),
    Script("a prompt in pieces", LONG, (7, 14, LONG, *range(LONG + 1, TOTAL))),
    Script("a long prompt", LONG, (LONG, LONG + 1, TOTAL - 1)),
    Script("without a cache", SHORT, (SHORT, *range(SHORT + 3, TOTAL, 3), TOTAL - 1), cached=False),
)
"""Each crosses every boundary of a tiny copy: by a token, within a step, within a prompt, within a chunk of it."""


@dataclass(frozen=True)
class StepRange:
    """A step of the decode loop: the tokens `[begin, end)` at position `begin`. It gives the logits from `start` on."""

    begin: int
    start: int
    end: int
    rope_length: int


def steps_of(stage: CutModel, prompt: int, ends: Sequence[int]) -> list[StepRange]:
    """The steps of a text. At the length from which a model computes its sequences again, a step ends, and the next one
    begins at the first token (generation/generator.py)."""
    limit = rope_restart(body_of(stage).config)
    found, start, rope_length = list[StepRange](), 0, prompt
    for end in ends:
        if limit is not None and prompt <= limit and start <= limit < end:
            if start < limit:
                found.append(StepRange(start, start, limit, rope_length))
            start, rope_length = limit, end
            found.append(StepRange(0, start, end, rope_length))
        else:
            found.append(StepRange(start, start, end, rope_length))
        start = end
    return found


@torch.no_grad()
def run_steps(
    stages: Sequence[CutModel], ids: Tensor, script: Script, new_cache: Callable[[], Cache] = DynamicCache
) -> Tensor:
    """The logits [T, V] of the first T = `script.ends[-1]` of `ids` [1, n], in the steps of a script."""
    caches, logits = [new_cache() if script.cached else None for _ in stages], []
    for step in steps_of(stages[0], script.prompt, script.ends):
        if script.cached and step.begin < step.start:
            caches = [new_cache() for _ in stages]
        begin = step.begin if script.cached else 0
        x = ids[:, begin : step.end]
        for stage, cache in zip(stages, caches, strict=True):
            x = forward(stage, x, begin, cache, parts=[(step.rope_length, x.shape[1])])
        logits.append(x[0, step.start - step.end :])
    return torch.cat(logits)


@torch.no_grad()
def rolls_back(model: nn.Module, ids: Tensor) -> bool:
    """Whether steps past all boundaries give the same logits again after the cache was truncated to the prompt."""
    (stage,) = cut_whole(model)
    cache, again, prompt = DynamicCache(), ids[:, SHORT : TOTAL - 1], ids[:, :SHORT]
    forward(stage, prompt, 0, cache)
    once = forward(stage, again, SHORT, cache)
    cache.crop(-again.shape[1])
    return torch.equal(once, forward(stage, again, SHORT, cache))


def cut_whole(model: nn.Module) -> list[CutModel]:
    """A copy of a whole model as its one stage."""
    return [carve(copy.deepcopy(model), 0, structure_of(model).n_layers, first=True, last=True)]


def cut(model: nn.Module, plan: SplitPlan) -> list[CutModel]:
    """Bottom, trunk and top of a copy of a whole model."""
    ranges = ((0, plan.start), (plan.start, plan.end), (plan.end, plan.n_layers))
    return [
        carve(copy.deepcopy(model), start, end, first=index == 0, last=index == 2)
        for index, (start, end) in enumerate(ranges)
    ]
