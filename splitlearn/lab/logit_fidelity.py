"""How far a set of flags moves the logits of a fixed sequence of ids, in either arm.

The ids are given, not sampled, so that two sets of flags are compared step by step on the same input. A process of its
own computes the logits (lab/logits.py); what is here is arithmetic on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import Kind
from splitlearn.flags.selection import FlagSet
from splitlearn.lab.design import Plan, Question
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import process

Logits = NDArray[np.float32]
TEXT = (
    "When we look to the individuals of the same variety or sub-variety of our older cultivated plants and animals, "
    "one of the first points which strikes us, is, that they generally differ much more from each other, than do the "
    "individuals of any one species or variety in a state of nature."
)
"""The text for the perplexity: the first sentence of Darwin's Origin of Species (1859), chapter I."""
TEXT_TOKENS = 64


@dataclass(frozen=True)
class FixedInput:
    """The ids to run through an arm: the first `prompt_tokens` of `ids` in one step, then the others singly.

    `device` and `dtype` are torch's names.
    """

    files: ModelFiles
    plan: SplitPlan
    kind: Kind
    flags: FlagSet
    ids: tuple[int, ...]
    prompt_tokens: int
    threads: int | None
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Difference:
    """The difference of two sets of logits: the largest one, and the first step at which another token is best."""

    largest: float
    first_divergence: int | None


def difference(logits: Logits, baseline: Logits) -> Difference:
    """The difference of two sets of logits [steps, V]."""
    (other,) = np.nonzero(logits.argmax(-1) != baseline.argmax(-1))
    return Difference(float(np.abs(logits - baseline).max()), int(other[0]) if len(other) else None)


def logits_in_subprocess(given: FixedInput) -> Logits:
    """The last position's logits after each step [len(ids) - prompt_tokens + 1, V], from a process of its own: flags of
    process scope stay for the process's life."""
    found: Logits = _apart("send_logits", given)
    return found


def ids_apart(files: ModelFiles, text: str) -> tuple[int, ...]:
    """The ids of `text` as it is, from a process that has a tokenizer."""
    return tuple(_apart("send_ids", files.folder, text))


def _apart(what: str, *arguments: object) -> Any:
    return process.ask("The fidelity worker process", f"splitlearn.lab.logits:{what}", *arguments)


def perplexity(logits: Logits, ids: NDArray[np.int64]) -> float:
    """exp of the mean negative log likelihood of `ids` [n] under `logits` [n, V], each of the position before."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    log_likelihood = scores[np.arange(len(ids)), ids] - np.log(np.exp(scores).sum(-1))
    return float(np.exp(-log_likelihood.mean()))


def changes(runs: Runs, plan: Plan) -> Iterator[tuple[Question, dict[str, Any]]]:
    """What each flag that may change the numbers does to the logits of TEXT.

    Yields the largest difference, the first step at which another token is best, and the ratio of the perplexities.
    """
    ids = ids_apart(runs.files, TEXT)[:TEXT_TOKENS]
    known: dict[tuple[Kind, FlagSet], Logits] = {}
    for question in plan.questions:
        if plan.fidelity(question) == "exact":
            continue
        for name in (question.treated, question.control):
            key = question.kind, plan.arm(name).flags
            if key not in known:
                given = FixedInput(
                    runs.files, runs.plan, *key, ids, 1, runs.config.runs.threads, runs.device, runs.dtype
                )
                known[key] = logits_in_subprocess(given)
        treated, control = (known[question.kind, plan.arm(name).flags] for name in (question.treated, question.control))
        found, targets = difference(treated, control), np.array(ids[1:])
        ratio = perplexity(treated[:-1], targets) / perplexity(control[:-1], targets)
        yield question, {**vars(found), "perplexity_ratio": ratio}
