"""The victim of a sweep: a split model in this process, whose trunk gets what would cross the wire, and keeps it.

    split = SplitModel(files, plan, "float32")
    session = split.run("Dear Ms Keller, ...", frozenset({"wire_dtype=int8"}), answer_tokens=8)

The stages are those of a client and its server, and the decode loop is theirs. Between them each hidden state becomes
bytes and is read again, as on a stream. A test holds these captures equal to a relay's, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.flags.registry import settings
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.cut import CutModel, forward
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.capture import FORMS, Capture
from splitlearn.privacy.rotation import rotated_trunk, turned
from splitlearn.privacy.scores import Loss
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.codec import DTYPES
from splitlearn.wire.hidden_states import Rows, converted

FLAGS = frozenset({"low_cpu_mem_usage", "use_fast", "inference_mode", "use_cache"})


@dataclass(frozen=True)
class VictimSession:
    """What the trunk had of one prompt, and what it was: the ids of the prompt and of the greedy answer. `loss` is what
    the split model makes of the prompt's tokens after the first."""

    capture: Capture
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    loss: Loss


@dataclass
class WiredTrunk:
    """The trunk `inner` behind a wire of the form `rows`. Keeps what it has got and sent back in its last session. With
    `q` [H, H] the client rotates what it sends, and turns back what it gets."""

    inner: LocalStage
    rows: Rows
    q: Tensor | None = None
    sent: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)

    def open(self, own: SessionSettings, max_length: int) -> LocalSession:
        self.sent, self.returned = [], []
        return self.inner.open(own, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        outputs = list[StageOutput]()
        for item in batch:
            own = item.x if self.q is None else turned(item.x, self.q)
            (output,) = self.inner.step([replace(item, x=self._through(own, item.position, self.sent))])
            back = self._through(output.x, item.position, self.returned)
            outputs.append(replace(output, x=back if self.q is None else turned(back, self.q.T)))
        return outputs

    def _through(self, x: Tensor, position: int, kept: list[Tensor]) -> Tensor:
        read = self.rows.from_bytes(self.rows.to_bytes(x), x.shape[-1])
        kept[position:] = list(read[0].clone())
        return converted(read, self.inner.dtype)


class SplitModel:
    """All parts of a split model in this process. `dtype` is that of the computation, by its name, and `seed` that of
    what the client draws. With `rotated` it rotates its hidden states and gives the trunk weights for such. Raises
    InputError for a model that a rotation would change."""

    def __init__(self, files: ModelFiles, plan: SplitPlan, dtype: str, seed: int = 0, rotated: bool = False) -> None:
        self.files, self.plan, self.dtype, self.seed = files, plan, dtype, seed
        self.tokens = Tokens.load(files.folder, use_fast=True)
        bottom, *rest = loading.client_specs(plan)
        specs, own = [bottom, *loading.trunk_specs(plan), *rest], settings(FLAGS)
        self._bottom, trunk, *self._rest = loading.load(
            files, specs, own.load, loading.Placement.of("cpu", dtype)
        ).chain
        assert isinstance(trunk, LocalStage)
        self.trunk, self._q = trunk, rotated_trunk(trunk.cut, files.facts, seed) if rotated else None

    @property
    def cuts(self) -> list[CutModel]:
        """All stages, from the embeddings to the LM head."""
        return [stage.cut for stage in (self._bottom, self.trunk, *self._rest)]

    def run(self, prompt: str, flags: frozenset[str], answer_tokens: int) -> VictimSession:
        """Answer `prompt` greedily, without a chat template, with exactly `answer_tokens` tokens. `flags` of client and
        trunk come to FLAGS. Raises InputError for a prompt without tokens, or with too many for the model's context."""
        own = settings(FLAGS | flags)
        rows = own.session.rows(DTYPES[self.dtype])
        wired = WiredTrunk(self.trunk, rows, self._q)
        links = [Link(stage, own.session) for stage in (self._bottom, wired, *self._rest)]
        answers = Generator(links, self.tokens, self.files.facts.context_length, own.generation)
        sampling = SamplingParams(seed=self.seed)
        asked = GenerationRequest(prompt, answer_tokens, sampling=sampling, chat=False, ignore_eos=True)
        events = [event for event in answers.stream(asked) if isinstance(event, TokenEvent)]
        answer = tuple(token for event in events for token in event.token_ids)
        ids = tuple(self.tokens.encode(prompt, chat=False))
        form = next(name for name, each in FORMS.items() if each == rows)
        states = (torch.stack(wired.sent), torch.stack(wired.returned))
        files = self.files
        found = Capture(files.name, files.digest, self.plan, self.dtype, form, len(ids), *states)
        return VictimSession(found, ids, answer, self._loss(states[1][: len(ids)], ids))

    def _loss(self, returned: Tensor, ids: tuple[int, ...]) -> Loss:
        """That of a prompt's `ids` [P], from what came back for them, [P, H]."""
        x = converted(returned, self.trunk.dtype).unsqueeze(0)
        x = x if self._q is None else turned(x, self._q.T)
        with torch.inference_mode():
            for stage in self._rest:
                x = forward(stage.cut, x, 0, None)
            nats = cross_entropy(x[0, :-1].float(), torch.tensor(ids[1:]), reduction="sum")
        return Loss(float(nats), len(ids) - 1)
