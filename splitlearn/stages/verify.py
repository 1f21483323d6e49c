"""Checks a candidate, a faster way through a stage, against the model's own forward before it is used.

    reason = reason_against(cut, candidate)     # None: it gives what the model gives, but for rounding

Two sessions take the same steps both ways: prompts, single tokens and a piece of a prompt, over caches in one pool.
This is the only such check, and `agree` the only rule for what counts as rounding.
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
"""In each round, how many tokens come to the first session and to the second."""
SESSION_TOKENS = 5

Candidate = Callable[[Sequence[StageInput]], Sequence[Tensor]]
"""Gives the outputs of the steps of a round, all positions of each, and extends their caches."""


def reason_against(cut: CutModel, candidate: Candidate, settings: SessionSettings | None = None) -> str | None:
    """Why `candidate` cannot take the place of the stage's own forward in sessions with `settings`, or None when it
    can. A compiled stage runs eagerly meanwhile."""
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
    """All positions of a step by the model's own forward, with which every candidate is compared."""
    session: LocalSession = step.session
    return forward(cut, step.x, step.position, session.cache, arguments=session.settings.forward_arguments)


def with_tokens_by(cut: CutModel, one_token: Callable[[StageInput], Tensor]) -> Candidate:
    """The candidate that computes steps of one token by `one_token`, and longer ones by the model's own forward."""
    return lambda steps: [one_token(step) if step.x.shape[1] == 1 else own_forward(cut, step) for step in steps]


def rounding(dtype: torch.dtype) -> float:
    """How far two orders of the same operations may lie apart in `dtype`, relative to the values: 1e-3, or the square
    root of its epsilon where that is more."""
    return max(1e-3, float(torch.finfo(dtype).eps ** 0.5))


def agree(own: Tensor, found: Tensor, near: float) -> bool:
    """Whether `found` lies within `near` of each value of `own`, or of the largest one. What is not finite agrees with
    nothing."""
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
