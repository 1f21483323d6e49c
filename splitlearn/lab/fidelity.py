"""The logits of a fixed sequence of ids under a set of flags, in either arm: what fidelity is judged by.

The ids are given, not sampled, so that two sets of flags are compared step by step on the same input. The split arm's
trunk is the stage that the trunk server's engine runs, here in the same process: the wire carries float32 unchanged.
"""

from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from splitlearn import loading, process
from splitlearn.arm import Kind
from splitlearn.generate import Feed
from splitlearn.selection import FlagSet
from splitlearn.split import SplitPlan
from splitlearn.store import ModelFiles


@dataclass(frozen=True)
class Difference:
    """How one set of logits differs from another: the largest difference, and the first step of another best token."""

    largest: float
    first_divergence: int | None


def difference(logits: torch.Tensor, baseline: torch.Tensor) -> Difference:
    """Of two sets of logits [steps, V]."""
    other = (logits.argmax(-1) != baseline.argmax(-1)).nonzero()
    return Difference((logits - baseline).abs().max().item(), int(other[0]) if len(other) else None)


def logits(
    files: ModelFiles,
    plan: SplitPlan,
    kind: Kind,
    flags: FlagSet,
    ids: list[int],
    prompt_tokens: int,
    threads: int | None,
) -> torch.Tensor:
    """The last position's logits, float32 [len(ids) - prompt_tokens + 1, V], on the CPU: of the prompt, the first
    `prompt_tokens` of `ids`, in one step, and after each of the other ids fed singly."""
    feeds = _feeds(files, plan, kind, flags, len(ids), threads)
    rows: list[torch.Tensor] = []
    position = 0
    for end in range(prompt_tokens, len(ids) + 1):
        start, x = position, torch.tensor([ids[position:end]])
        for feed in feeds:
            start, output = feed.step(start, x)
            x = output.x
        rows.append(x[0, -1])
        position = end
    return torch.stack(rows).clone()


def logits_apart(
    files: ModelFiles,
    plan: SplitPlan,
    kind: Kind,
    flags: FlagSet,
    ids: list[int],
    prompt_tokens: int,
    threads: int | None,
) -> torch.Tensor:
    """As `logits`, in a process of its own, since flags of process scope stay for the process's life."""
    child = process.start("The fidelity worker process", _main, files, plan, kind, flags, ids, prompt_tokens, threads)
    try:
        found: torch.Tensor = torch.from_numpy(child.receive())
    finally:
        child.stop()
    return found


def _main(connection: Connection, *arguments: object) -> None:
    connection.send(logits(*arguments).numpy())  # type: ignore[arg-type]
    connection.recv()  # until the parent has it and closes


def _feeds(
    files: ModelFiles, plan: SplitPlan, kind: Kind, flags: FlagSet, max_length: int, threads: int | None
) -> list[Feed]:
    bottom, top = loading.client_specs(plan)
    full = [(loading.full_specs(plan.n_layers)[0], flags.full)]
    split = [(bottom, flags.client), (loading.trunk_specs(plan)[0], flags.trunk), (top, flags.client)]
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    feeds = []
    for spec, applied in full if kind == "full" else split:
        loading.prepare_process(applied, threads)
        stage = loading.load(files, [spec], applied, placement).stages[0]
        feeds.append(Feed(stage, stage.open(applied, max_length)))
    return feeds
