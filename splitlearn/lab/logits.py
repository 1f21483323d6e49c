"""Computes the logits of an arm on given ids, in this process; the fidelity worker runs it.

The split arm's trunk is the stage that the trunk server's engine runs, here in the same process. Its hidden states are
encoded for the wire and decoded again, both ways.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from splitlearn.errors import as_error
from splitlearn.flags.registry import settings
from splitlearn.generation.chain import Link, Step, open_chains
from splitlearn.generation.forward import InStep
from splitlearn.generation.step_timing import Ledger
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows


def logits(given: FixedInput) -> torch.Tensor:
    """The last position's logits after each step, float32 [len(ids) - prompt_tokens + 1, V], on the CPU."""
    rows: list[torch.Tensor] = []
    with ExitStack() as stack:
        stages, (chain,) = open_chains(stack, _links(given), given.prompt_tokens, len(given.ids), 1)
        forward, position = InStep(stages, Ledger()), 0
        for end in range(given.prompt_tokens, len(given.ids) + 1):
            (found,) = forward([Step(0, chain, position, torch.tensor([given.ids[position:end]]))])
            rows.append(found[-1].float().cpu())
            position = end
    return torch.stack(rows).clone()


def send_logits(connection: Connection, given: FixedInput) -> None:
    """The worker of `logit_fidelity.logits_in_subprocess`: sends the logits as an array, or the error."""
    try:
        connection.send(logits(given).numpy())
    except Exception as error:
        connection.send(as_error(error, "computing logits"))
    connection.recv()  # stay until the parent has it and closes


def send_ids(connection: Connection, folder: Path, text: str) -> None:
    """The worker of `logit_fidelity.ids_apart`: sends the ids of `text` as it is, or the error."""
    try:
        connection.send(Tokens.load(folder, use_fast=True).encode(text, chat=False))
    except Exception as error:
        connection.send(as_error(error, "reading the tokenizer"))
    connection.recv()


def _links(given: FixedInput) -> list[Link]:
    bottom, *rest = loading.client_specs(given.plan)
    full = [(loading.full_specs(given.plan.n_layers)[0], given.flags.full)]
    split = [(bottom, given.flags.client), (loading.trunk_specs(given.plan)[0], given.flags.trunk)]
    split += [(spec, given.flags.client) for spec in rest]
    links = []
    placement = loading.Placement.of(given.device, given.dtype)
    for spec, applied in full if given.kind == "full" else split:
        own = settings(applied)
        loading.prepare_process(own.process, given.threads)
        stage: Stage = loading.load(given.files, [spec], own.load, placement).chain[0]
        if spec.label == "trunk":
            stage = _WireRoundTrip(stage, own.session.rows(placement.dtype))
        links.append(Link(stage, own.session))
    return links


@dataclass(frozen=True)
class _WireRoundTrip:
    """A stage whose inputs and outputs are encoded as `rows` and decoded again."""

    stage: Stage
    rows: Rows

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        """Open a session of the stage."""
        return self.stage.open(settings, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The stage's step, with both hidden states encoded and decoded."""
        outputs = self.stage.step([replace(item, x=self._round_trip(item.x)) for item in batch])
        return [replace(output, x=self._round_trip(output.x)) for output in outputs]

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows.from_bytes(self.rows.to_bytes(x), x.shape[2]).to(x.dtype)
