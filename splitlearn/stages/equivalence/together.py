"""Tests on a tiny random copy what else a stage of an architecture can do, whatever the lengths of its sessions.

One session is past every boundary of the copy, and one is below them. In one forward each must get what `generate()`
gives. So must each with a static cache, which is masked memory of a fixed length. The real stage cannot be tested so:
its window may have 4,096 tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from splitlearn.kvcache.layers import static
from splitlearn.kvcache.pool import KVPool, Slot, shapes_of
from splitlearn.models.cut import CutModel
from splitlearn.stages.base import StageInput
from splitlearn.stages.equivalence.judge import TOLERANCE, TOTAL, Text
from splitlearn.stages.equivalence.steps import LONG, SHORT, Script, cut_whole, run_steps, steps_of
from splitlearn.stages.ragged_batch import RaggedStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.verify import agree, own_forward

SHARED_FORWARD, STATIC_CACHE = "shared forward", "static cache"
ENDS = ((SHORT, LONG), (SHORT + 3, LONG + 1), (SHORT + 6, LONG + 2), (TOTAL - 1, TOTAL - 1))
"""For each step, its end in a short text and in a long one. The short one crosses all boundaries."""
Way = Callable[[CutModel, Sequence[Text]], list[Tensor]]
"""Computes the logits [TOTAL - 1, V] of each text."""


def allowed(model: nn.Module, short: Text, long: Text) -> tuple[str, ...]:
    """Those of SHARED_FORWARD and STATIC_CACHE that give the logits of `generate()` for both texts."""
    ways: dict[str, Way] = {SHARED_FORWARD: _ragged, STATIC_CACHE: _static}
    return tuple(name for name, way in ways.items() if _agrees(way, model, (short, long)))


@torch.inference_mode()
def _agrees(way: Way, model: nn.Module, texts: Sequence[Text]) -> bool:
    try:
        found = way(cut_whole(model)[0], texts)
    except Exception:  # layers that raise anything cannot do it
        return False
    return all(agree(text.logits, own, TOLERANCE) for own, text in zip(found, texts, strict=True))


def _static(stage: CutModel, texts: Sequence[Text]) -> list[Tensor]:
    ends, layers = (SHORT, SHORT + 3, *range(SHORT + 4, TOTAL)), stage.end - stage.start
    return [
        run_steps([stage], text.ids, Script("", text.prompt, ends), lambda: static(layers, TOTAL + 3)) for text in texts
    ]


def _ragged(stage: CutModel, texts: Sequence[Text]) -> list[Tensor]:
    pool = KVPool(shapes_of(stage, texts[0].ids[:, :1]), len(texts), TOTAL, torch.float32, torch.device("cpu"))
    caches = [pool.cache(Slot(at * TOTAL, TOTAL)) for at in range(len(texts))]
    sessions = [LocalSession(cache, SessionSettings(), TOTAL, partial(own_forward, stage)) for cache in caches]
    logits, ragged = [list[Tensor]() for _ in texts], RaggedStage(stage)
    ways = [steps_of(stage, text.prompt, [end[at] for end in ENDS]) for at, text in enumerate(texts)]
    for steps in zip_longest(*ways):
        taking = [(at, step) for at, step in enumerate(steps) if step is not None]
        parts = []
        for at, step in taking:
            caches[at].crop(step.begin - caches[at].get_seq_length())
            ids = texts[at].ids[:, step.begin : step.end]
            rows = step.end - step.start
            parts.append(StageInput(sessions[at], step.begin, ids, rows, rope_length=step.rope_length))
        for (at, _), out in zip(taking, ragged.forward(parts), strict=True):
            logits[at].append(out[0])
    return [torch.cat(own) for own in logits]
