"""The victim of a sweep: a split model in this process, whose trunk gets what would cross the wire, and keeps it.

    split = SplitModel(files, plan, "float32")
    session = split.run("Dear Ms Keller, ...", rows, answer_tokens=8)

The stages are those of a client and its server, and the decode loop is theirs. Between them each hidden state becomes
bytes and is read again, as on a stream. A test holds these captures equal to a relay's, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.flags.registry import settings
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.capture import FORMS, Capture
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows, converted

FLAGS = frozenset({"low_cpu_mem_usage", "use_fast", "inference_mode", "use_cache"})


@dataclass(frozen=True)
class VictimSession:
    """What the trunk had of one prompt, and what it was: the ids of the prompt and of the greedy answer."""

    capture: Capture
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass
class WiredTrunk:
    """The trunk `inner` behind a wire of the form `rows`. Keeps what it has got and sent back in its last session."""

    inner: LocalStage
    rows: Rows
    sent: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)

    def open(self, own: SessionSettings, max_length: int) -> LocalSession:
        self.sent, self.returned = [], []
        return self.inner.open(own, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        outputs = list[StageOutput]()
        for item in batch:
            x = self._through(item.x, item.position, self.sent)
            (output,) = self.inner.step([replace(item, x=x)])
            outputs.append(replace(output, x=self._through(output.x, item.position, self.returned)))
        return outputs

    def _through(self, x: Tensor, position: int, kept: list[Tensor]) -> Tensor:
        read = self.rows.from_bytes(self.rows.to_bytes(x), x.shape[-1])
        kept[position:] = list(read[0].clone())
        return converted(read, self.inner.dtype)


class SplitModel:
    """All parts of a split model in this process. `dtype` is that of the computation, by its name."""

    def __init__(self, files: ModelFiles, plan: SplitPlan, dtype: str) -> None:
        self.files, self.plan, self.dtype = files, plan, dtype
        self.tokens = Tokens.load(files.folder, use_fast=True)
        bottom, *rest = loading.client_specs(plan)
        specs, own = [bottom, *loading.trunk_specs(plan), *rest], settings(FLAGS)
        self._session = own.session
        self._stages = loading.load(files, specs, own.load, loading.Placement.of("cpu", dtype)).chain

    def run(self, prompt: str, rows: Rows, answer_tokens: int) -> VictimSession:
        """Answer `prompt` greedily, without a chat template, with exactly `answer_tokens` tokens. Raises InputError for
        a prompt without tokens, or with too many for the model's context."""
        bottom, trunk, *rest = self._stages
        assert isinstance(trunk, LocalStage)
        wired = WiredTrunk(trunk, rows)
        links = [Link(stage, self._session) for stage in (bottom, wired, *rest)]
        answers = Generator(links, self.tokens, self.files.facts.context_length, settings(FLAGS).generation)
        asked = GenerationRequest(prompt, answer_tokens, chat=False, ignore_eos=True)
        events = [event for event in answers.stream(asked) if isinstance(event, TokenEvent)]
        answer = tuple(token for event in events for token in event.token_ids)
        ids = tuple(self.tokens.encode(prompt, chat=False))
        form = next(name for name, each in FORMS.items() if each == rows)
        states = (torch.stack(wired.sent), torch.stack(wired.returned))
        files = self.files
        found = Capture(files.name, files.digest, self.plan, self.dtype, form, len(ids), *states)
        return VictimSession(found, ids, answer)
