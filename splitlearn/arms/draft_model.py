"""Drafts by a second, smaller model with the same vocabulary, loaded whole beside a client's stages or the full model.

A draft takes time, so each is computed only when it is asked for. Drafts are verified (generation/speculation.py) and
never change an answer, so the weights are in 4 bits wherever there are kernels for that.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, NotFinite
from splitlearn.flags.registry import settings
from splitlearn.flags.selection import FAST, FAST_IN_ANY
from splitlearn.generation.speculation import COUNTS
from splitlearn.generation.tokenizer import Tokens
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.loading import Placement
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings

LONGEST = 4096
"""Tokens that a draft model sees, where it names no context length."""


def check_vocabulary(draft: ModelFiles, files: ModelFiles) -> None:
    """Raise InputError unless both models mean the same text by each token id."""
    theirs, ours = (Tokens.load(each.folder, use_fast=True).vocabulary() for each in (draft, files))
    if theirs != ours:
        differ = len(set(theirs.items()) ^ set(ours.items()))
        wanted = f"a model with the vocabulary of {files.name}; of its {len(theirs)} tokens and the {len(ours)} there"
        raise InputError("model.draft", draft.name, f"{wanted}, {differ} differ")


def load(files: ModelFiles, placement: Placement) -> tuple[Callable[[], "DraftModel"], float]:
    """Load the draft model whole. Returns a function that makes a proposer for an answer, and the seconds of loading.
    Raises as `loading.load`."""
    own = settings(frozenset((FAST if placement.device.type == "cpu" else FAST_IN_ANY).split(",")))
    loaded = loading.load(files, loading.full_specs(files.n_layers), own.load, placement)
    size = Tokens.load(files.folder, use_fast=True).size
    longest = files.facts.context_length or LONGEST
    make = partial(DraftModel, loaded.stages[0], threading.Lock(), own.session, size, longest)
    return make, loaded.load_s


class DraftModel:
    """The proposer of one answer: it drafts the draft model's own greedy continuation of the answer so far.

    It keeps a KV cache from step to step. The first `size` logits are tokens. It sees at most `longest` tokens. Answers
    that are generated at once share `computing`: the stage computes one step at a time."""

    costs = True

    def __init__(
        self, stage: LocalStage, computing: threading.Lock, settings: SessionSettings, size: int, longest: int
    ) -> None:
        self._stage, self._computing, self._size, self._longest = stage, computing, size, longest
        self._session = stage.open(settings, longest)
        self._fed: list[int] = []
        self._rope_length = 0

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        """As many drafts as a step may have, each computed when it is first looked at."""
        room = self._longest - len(sequence)
        return _Ahead(self, sequence, max(0, min(COUNTS[-1], room))), 0

    def ahead(self, sequence: Sequence[int], count: int) -> list[int]:
        """The `count` tokens with which this model continues `sequence`."""
        most = min(len(self._fed), len(sequence) - 1)
        position = next((at for at in range(most) if self._fed[at] != sequence[at]), most)
        position = self._begin(position, len(sequence))
        new, found = list(sequence[position:]), list[int]()
        while len(found) < count:
            item = StageInput(self._session, position, torch.tensor([new]), rope_length=self._rope_length)
            logits = self._stepped(item)[0, -1]
            self._fed[position:] = new
            position += len(new)
            new = [int(logits[: self._size].argmax())]
            found += new
        return found

    def _begin(self, position: int, tokens: int) -> int:
        """Where a step of a sequence of `tokens` begins: at `position`, or at 0 for the first step and where the
        sequence has outgrown the length up to which its rotary embeddings hold."""
        limit = self._stage.rope_restart
        if self._fed and (limit is None or self._rope_length > limit or tokens <= limit):
            return position
        self._rope_length = tokens
        return 0

    def _stepped(self, item: StageInput) -> torch.Tensor:
        try:
            with self._computing:
                return self._stage.step([item])[0].x
        except NotFinite as error:
            raise NotFinite(f"model.draft: {error}") from error


class _Ahead(Sequence[int]):
    """The `most` tokens that continue `sequence`."""

    def __init__(self, model: DraftModel, sequence: Sequence[int], most: int) -> None:
        self._model, self._sequence, self._most = model, sequence, most

    def __len__(self) -> int:
        return self._most

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        last = at.indices(self._most)[1] if isinstance(at, slice) else at + 1
        return self._model.ahead(self._sequence, last)[at]
