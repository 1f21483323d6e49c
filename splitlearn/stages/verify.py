"""Checks a candidate, a faster way to compute a stage, against the model's own forward before it is used.

    reason = reason_against(cut, candidate)     # None: its outputs are the model's, but for rounding

Two sessions take the same steps both ways: prompts, single tokens and a chunk of a prompt, over caches in one pool.
This is the only such check, and `agree` is the only tolerance rule.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from splitlearn.kvcache.pool import KVPool, Slot, shapes_of
from splitlearn.models.cut import CutModel, dtype_of, eagerly, example, forward
from splitlearn.stages.base import StageInput
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings

ROUNDS = ((3, 2), (1, 2), (1,))
"""The tokens of the first and the second session in each round."""
SESSION_TOKENS = 5

Candidate = Callable[[Sequence[StageInput]], Sequence[Tensor]]
"""Computes the outputs of a round's steps, all positions of each, and extends their caches."""


def reason_against(cut: CutModel, candidate: Candidate, settings: SessionSettings | None = None) -> str | None:
    """Why `candidate` cannot replace the stage's own forward in sessions with `settings`, or None if it can. A compiled
    stage runs eagerly during the check."""
    settings = settings or SessionSettings()
    try:
        with torch.inference_mode(), eagerly(cut):
            own = _outputs(cut, lambda steps: [own_forward(cut, step) for step in steps], settings)
            found = _outputs(cut, candidate, settings)
            near = rounding(dtype_of(cut))
            same = all(agree(one, other.to(one.device), near) for one, other in zip(own, found, strict=True))
    except Exception as error:  # each family's layers fail in their own way
        return f"{type(error).__name__}: {error}"
    return None if same else "its output differs from that of the model's own forward"


def own_forward(cut: CutModel, step: StageInput) -> Tensor:
    """All positions of a step by the model's own forward. Every candidate is compared with this."""
    session: LocalSession = step.session
    return forward(cut, step.x, step.position, session.cache, arguments=session.settings.forward_arguments)


def with_tokens_by(cut: CutModel, one_token: Callable[[StageInput], Tensor]) -> Candidate:
    """A candidate that computes steps of one token by `one_token`, and longer ones by the model's own forward."""
    return lambda steps: [one_token(step) if step.x.shape[1] == 1 else own_forward(cut, step) for step in steps]


def rounding(dtype: torch.dtype) -> float:
    """The tolerance between two orders of the same operations in `dtype`, relative to the values: 1e-3, or the square
    root of its epsilon if that is more."""
    return max(1e-3, float(torch.finfo(dtype).eps ** 0.5))


def agree(own: Tensor, found: Tensor, near: float) -> bool:
    """Whether `found` is within `near` of each value of `own`, relative to the value or to the largest one. NaN and Inf
    agree with nothing."""
    most = float(own.abs().max())
    return math.isfinite(most) and torch.allclose(own, found, rtol=near, atol=near * most)


def _outputs(cut: CutModel, candidate: Candidate, settings: SessionSettings) -> list[Tensor]:
    x = example(cut, 2 * SESSION_TOKENS)
    pool = KVPool(shapes_of(cut, x[:, :1]), 2, SESSION_TOKENS, dtype_of(cut), x.device)
    caches = [pool.cache(Slot(at * SESSION_TOKENS, SESSION_TOKENS)) for at in range(2)]
    sessions = [LocalSession(cache, settings, SESSION_TOKENS, partial(own_forward, cut)) for cache in caches]
    found, ends = list[Tensor](), [0, 0]
    for tokens in ROUNDS:
        steps = [
            StageInput(session, end, x[:, at * SESSION_TOKENS + end :][:, :count], logits=0)
            for at, (session, end, count) in enumerate(zip(sessions, ends, tokens, strict=False))
        ]
        found += candidate(steps)
        ends = [end + count for end, count in zip(ends, (*tokens, 0), strict=False)]
    return found
