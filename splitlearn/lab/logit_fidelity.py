"""The logits of a fixed sequence of ids under a set of flags, in either arm: what fidelity is judged by.

The ids are given, not sampled, so that two sets of flags are compared step by step on the same input. The split arm's
trunk is the stage that the trunk server's engine runs, here in the same process; its hidden states are put into the
form that they have on the wire and back, both ways.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from splitlearn.arms.arm import Kind
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import SplitlearnError, as_error
from splitlearn.flags.registry import settings
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.chain import Feed
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.design import Plan, Question
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import process
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows

TEXT = (
    "When we look to the individuals of the same variety or sub-variety of our older cultivated plants and animals, "
    "one of the first points which strikes us, is, that they generally differ much more from each other, than do the "
    "individuals of any one species or variety in a state of nature."
)
"""What perplexity is taken of: the first sentence of Darwin's Origin of Species (1859), chapter I."""
TEXT_TOKENS = 64


@dataclass(frozen=True)
class Fed:
    """What is fed through an arm: the first `prompt_tokens` of `ids` in one step, then the others singly."""

    files: ModelFiles
    plan: SplitPlan
    kind: Kind
    flags: FlagSet
    ids: tuple[int, ...]
    prompt_tokens: int
    threads: int | None
    placement: loading.Placement = loading.Placement(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Difference:
    """How one set of logits differs from another: the largest difference, and the first step of another best token."""

    largest: float
    first_divergence: int | None


def difference(logits: torch.Tensor, baseline: torch.Tensor) -> Difference:
    """Of two sets of logits [steps, V]."""
    other = (logits.argmax(-1) != baseline.argmax(-1)).nonzero()
    return Difference((logits - baseline).abs().max().item(), int(other[0]) if len(other) else None)


def logits(fed: Fed) -> torch.Tensor:
    """The last position's logits after each step, float32 [len(ids) - prompt_tokens + 1, V], on the CPU."""
    feeds = _feeds(fed)
    rows: list[torch.Tensor] = []
    position = 0
    for end in range(fed.prompt_tokens, len(fed.ids) + 1):
        start, x = position, torch.tensor([fed.ids[position:end]])
        for feed in feeds:
            start, output = feed.step(start, x)
            x = output.x
        rows.append(x[0, -1].float().cpu())
        position = end
    return torch.stack(rows).clone()


def logits_apart(fed: Fed) -> torch.Tensor:
    """As `logits`, in a process of its own, since flags of process scope stay for the process's life."""
    child = process.start("The fidelity worker process", _main, fed)
    try:
        found = child.receive()
        if isinstance(found, SplitlearnError):
            raise found
        return torch.from_numpy(found)
    finally:
        child.stop()


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean negative log likelihood of `ids` int64 [n] under `logits` [n, V], each of the position before."""
    return float(torch.nn.functional.cross_entropy(logits, ids).exp())


def changes(runs: Runs, plan: Plan) -> Iterator[tuple[Question, dict[str, Any]]]:
    """What each flag that may change the numbers does to the logits of TEXT.

    Gives the largest difference, the first step at which another token is best, and the ratio of the perplexities.
    """
    ids = tuple(Tokens.load(runs.files.folder, use_fast=True).encode(TEXT, chat=False))[:TEXT_TOKENS]
    placement = loading.Placement(runs.device, runs.dtype)
    known: dict[tuple[Kind, FlagSet], torch.Tensor] = {}
    for question in plan.questions:
        if plan.fidelity(question) == "exact":
            continue
        for name in (question.treated, question.control):
            key = question.kind, plan.arm(name).flags
            if key not in known:
                fed = Fed(runs.files, runs.plan, *key, ids, 1, runs.config.runs.threads, placement)
                known[key] = logits_apart(fed)
        treated, control = (known[question.kind, plan.arm(name).flags] for name in (question.treated, question.control))
        found, targets = difference(treated, control), torch.tensor(ids[1:])
        ratio = perplexity(treated[:-1], targets) / perplexity(control[:-1], targets)
        yield question, {**vars(found), "perplexity_ratio": ratio}


def _main(connection: Connection, fed: Fed) -> None:
    try:
        connection.send(logits(fed).numpy())
    except Exception as error:
        connection.send(as_error(error, "computing logits"))
    connection.recv()  # until the parent has it and closes


def _feeds(fed: Fed) -> list[Feed]:
    bottom, top = loading.client_specs(fed.plan)
    full = [(loading.full_specs(fed.plan.n_layers)[0], fed.flags.full)]
    split = [(bottom, fed.flags.client), (loading.trunk_specs(fed.plan)[0], fed.flags.trunk), (top, fed.flags.client)]
    feeds = []
    for spec, applied in full if fed.kind == "full" else split:
        own = settings(applied)
        loading.prepare_process(own.process, fed.threads)
        stage: Stage = loading.load(fed.files, [spec], own.load, fed.placement).stages[0]
        if spec.word == "trunk":
            stage = _OverTheWire(stage, own.session.rows(fed.placement.dtype))
        feeds.append(Feed(stage, stage.open(own.session, len(fed.ids)), rope_length=fed.prompt_tokens))
    return feeds


@dataclass(frozen=True)
class _OverTheWire:
    """A stage whose hidden states come and go in the form of `rows`."""

    stage: Stage
    rows: Rows

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        """A session of the stage's own."""
        return self.stage.open(settings, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The stage's own step."""
        outputs = self.stage.step([replace(item, x=self._carried(item.x)) for item in batch])
        return [replace(output, x=self._carried(output.x)) for output in outputs]

    def _carried(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows.from_bytes(self.rows.to_bytes(x), x.shape[2]).to(x.dtype)
