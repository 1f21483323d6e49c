"""The logits of an arm on given ids, in this process: what the fidelity worker runs.

The split arm's trunk is the stage that the trunk server's engine runs, here in the same process; its hidden states are
put into the form that they have on the wire and back, both ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from splitlearn.errors import as_error
from splitlearn.flags.registry import settings
from splitlearn.generation.chain import Feed
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows


def logits(given: FixedInput) -> torch.Tensor:
    """The last position's logits after each step, float32 [len(ids) - prompt_tokens + 1, V], on the CPU."""
    feeds = _feeds(given)
    rows: list[torch.Tensor] = []
    position = 0
    for end in range(given.prompt_tokens, len(given.ids) + 1):
        start, x = position, torch.tensor([given.ids[position:end]])
        for feed in feeds:
            start, output = feed.step(start, x)
            x = output.x
        rows.append(x[0, -1].float().cpu())
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


def _feeds(given: FixedInput) -> list[Feed]:
    bottom, top = loading.client_specs(given.plan)
    full = [(loading.full_specs(given.plan.n_layers)[0], given.flags.full)]
    split = [
        (bottom, given.flags.client),
        (loading.trunk_specs(given.plan)[0], given.flags.trunk),
        (top, given.flags.client),
    ]
    feeds = []
    placement = loading.Placement.of(given.device, given.dtype)
    for spec, applied in full if given.kind == "full" else split:
        own = settings(applied)
        loading.prepare_process(own.process, given.threads)
        stage: Stage = loading.load(given.files, [spec], own.load, placement).stages[0]
        if spec.word == "trunk":
            stage = _WireRoundTrip(stage, own.session.rows(placement.dtype))
        feeds.append(Feed(stage, stage.open(own.session, len(given.ids)), rope_length=given.prompt_tokens))
    return feeds


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
