"""What an attacker computes with: the public checkpoint, and what can be learnt from it without any client.

    checkpoint = Checkpoint.of(capture, files)

The client's layers are in it like all others. Each part is loaded or learnt when it is first used, and then kept.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.cut import CutModel, body_of, forward
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.kept import kept
from splitlearn.privacy.linear_map import RIDGE, LinearMap
from splitlearn.privacy.recurrent_map import RECIPE, RecurrentMap
from splitlearn.privacy.token_table import TokenTable
from splitlearn.privacy.training_text import training_text, windows
from splitlearn.stages import loading
from splitlearn.stages.defences import Defence, Defended
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import LoadSettings

TABLE_ROWS = 1024
WINDOWS, WINDOW_TOKENS, WINDOWS_AT_ONCE = 256, 64, 16
NETWORK_WINDOWS = 512
FIRST_TOKENS = 8192
_LOADING = LoadSettings(assign_weights=True)


@dataclass(frozen=True)
class Pairs:
    """Known token ids [N, T], and the states [N, T, H] of them at the cut."""

    ids: Tensor
    states: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The model in `files`, seen by a server with the layers of `plan`. `dtype` is that in which clients compute.
    `seed` is that of all that is random, and `network_windows` for how many sequences a network is trained. `knows` is
    a defence of the client that the attacker knows, but for its seed; None is none. `asked` is what it has learnt of
    first layers that are not the checkpoint's; for the first position it still learns from those. `kept` is a folder in
    which what is learnt of public layers stays; None keeps none."""

    files: ModelFiles
    plan: SplitPlan
    dtype: str
    seed: int = 0
    knows: Defence | None = None
    network_windows: int = NETWORK_WINDOWS
    asked: Pairs | None = None
    kept: Path | None = None

    @classmethod
    def of(cls, capture: Capture, files: ModelFiles) -> "Checkpoint":
        """The checkpoint for `capture`. Raises InputError for files of another model."""
        if files.digest != capture.digest:
            expected = f"the model of the capture, {capture.model} with the digest {capture.digest[:12]}"
            raise InputError("model", f"{files.name} with the digest {files.digest[:12]}", expected)
        return cls(files, capture.plan, capture.dtype)

    @cached_property
    def bottom(self) -> LocalStage:
        """The client's first layers, with the embeddings."""
        return self._load(loading.StageSpec("bottom", 0, self.plan.start, first=True)).stages[0]

    @cached_property
    def top(self) -> CutModel:
        """The client's last layers, with norm and LM head."""
        loaded = self._load(loading.StageSpec("top", self.plan.end, self.plan.n_layers, last=True))
        return loaded.stages[0].cut if loaded.head is None else loaded.head.cut

    @cached_property
    def trunk(self) -> CutModel:
        """The layers of the trunk, as they are public."""
        return self._load(loading.trunk_specs(self.plan)[0]).stages[0].cut

    @cached_property
    def embeddings(self) -> Tensor:
        """The embedding of each token [V, E], in float32."""
        cut = self.bottom.cut
        table = body_of(cut).get_submodule(cut.structure.embedding.removeprefix(f"{cut.structure.body}."))
        assert isinstance(table.weight, Tensor)
        return table.weight.detach().float()

    @cached_property
    def embedding_table(self) -> TokenTable:
        """The embeddings, to find the closest one."""
        return TokenTable.of(self.embeddings)

    @cached_property
    def single_tokens(self) -> TokenTable:
        """The states at the cut of each token alone."""
        return TokenTable.of(self.states(torch.arange(len(self.embeddings)).unsqueeze(1), TABLE_ROWS)[:, 0])

    @cached_property
    def later(self) -> LinearMap:
        """From the states at a sequence's positions after the first to embeddings."""
        return LinearMap(**self._learnt("later", self._learn_later))

    def _learn_later(self) -> Mapping[str, Tensor]:
        own = self._pairs(WINDOWS)
        x, y = own.states[:, 1:], self.embeddings[own.ids[:, 1:]]
        return vars(LinearMap.fit(x.flatten(0, 1), y.flatten(0, 1)))

    @cached_property
    def first(self) -> LinearMap:
        """The same for the first position, whose states are unlike all others: it sees no other token."""
        return LinearMap(**self._learnt("first", self._learn_first))

    def _learn_first(self) -> Mapping[str, Tensor]:
        made = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(len(self.embeddings), (FIRST_TOKENS, 1), generator=made)
        return vars(LinearMap.fit(self.states(ids, TABLE_ROWS)[:, 0], self.embeddings[ids[:, 0]]))

    def _learnt(self, name: str, learn: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `learn` gives, or has given once for the same model, cut and recipe."""
        if self.kept is None or self.knows is not None or self.asked is not None:
            return learn()
        recipe = (WINDOWS, WINDOW_TOKENS, FIRST_TOKENS, RIDGE, self.network_windows, RECIPE, training_text())
        about = (name, self.files.digest, self.plan.start, self.dtype, self.seed, recipe)
        return kept(self.kept / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors", learn)

    def linear(self, x: Tensor) -> Tensor:
        """The embeddings [..., T, E] that the maps give for states [..., T, H] from position 0 on."""
        return torch.cat([self.first(x[..., :1, :]), self.later(x[..., 1:, :])], -2)

    @cached_property
    def recurrent(self) -> RecurrentMap:
        """What a network adds to the linear maps."""
        network = RecurrentMap(self.later, self.embedding_table)
        network.load_state_dict(self._learnt("recurrent", self._learn_recurrent))
        return network.eval()

    def _learn_recurrent(self) -> Mapping[str, Tensor]:
        own = self._pairs(self.network_windows)
        x = own.states.clone()  # outside of inference mode: a network is trained on it
        return RecurrentMap.fit(x, self.linear(x), own.ids, self.later, self.embedding_table, self.seed).state_dict()

    def inverted(self, x: Tensor) -> Tensor:
        """The embeddings [T, E] that maps and network give for states [T, H] from position 0 on."""
        linear, network = self.linear(x), self.recurrent  # which may be trained here
        with torch.inference_mode():
            found: Tensor = network(x.unsqueeze(0), linear.unsqueeze(0))[0]
        return found

    def _pairs(self, count: int) -> Pairs:
        """What is learnt from: what it has asked, or else `count` sequences of WINDOW_TOKENS tokens."""
        if self.asked is not None:
            return self.asked
        tokens = Tokens.load(self.files.folder, use_fast=True)
        text = tokens.encode(training_text(), chat=False)
        ids = windows(text, len(self.embeddings), count, WINDOW_TOKENS, self.seed)
        return Pairs(ids, self.states(ids, WINDOWS_AT_ONCE))

    def states(self, ids: Tensor, at_once: int) -> Tensor:
        """The states [N, T, H] at the cut of N sequences with the token ids [N, T], in float32, as a client with the
        defence that the attacker knows would send them."""
        with torch.inference_mode():
            x = torch.cat([forward(self.bottom.cut, some, 0, None).float() for some in torch.split(ids, at_once)])
        if self.knows is None:
            return x
        sent = list[Tensor]()
        for own, states in zip(ids.tolist(), torch.split(x, 1), strict=True):
            sample = Defended((self.knows,), self.seed + 1)  # another seed than the client's
            sample.feed(0, own)
            sent.append(sample.sent(states, len(own)))
        return torch.cat(sent)

    def _load(self, spec: loading.StageSpec) -> loading.LoadedStages:
        return loading.load(self.files, [spec], _LOADING, loading.Placement.of("cpu", self.dtype))
