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
from splitlearn.lab.logit_fidelity import Fed
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows


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


def send_logits(connection: Connection, fed: Fed) -> None:
    """The worker of `logit_fidelity.logits_apart`: sends the logits as an array, or the error."""
    try:
        connection.send(logits(fed).numpy())
    except Exception as error:
        connection.send(as_error(error, "computing logits"))
    connection.recv()  # until the parent has it and closes


def send_ids(connection: Connection, folder: Path, text: str) -> None:
    """The worker of `logit_fidelity.ids_apart`: sends the ids of `text` as it is, or the error."""
    try:
        connection.send(Tokens.load(folder, use_fast=True).encode(text, chat=False))
    except Exception as error:
        connection.send(as_error(error, "reading the tokenizer"))
    connection.recv()


def _feeds(fed: Fed) -> list[Feed]:
    bottom, top = loading.client_specs(fed.plan)
    full = [(loading.full_specs(fed.plan.n_layers)[0], fed.flags.full)]
    split = [(bottom, fed.flags.client), (loading.trunk_specs(fed.plan)[0], fed.flags.trunk), (top, fed.flags.client)]
    feeds = []
    placement = loading.Placement.of(fed.device, fed.dtype)
    for spec, applied in full if fed.kind == "full" else split:
        own = settings(applied)
        loading.prepare_process(own.process, fed.threads)
        stage: Stage = loading.load(fed.files, [spec], own.load, placement).stages[0]
        if spec.word == "trunk":
            stage = _OverTheWire(stage, own.session.rows(placement.dtype))
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
