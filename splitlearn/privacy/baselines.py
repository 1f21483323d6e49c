"""What is right without any hidden state: guesses to hold the attacks against.

`frequent` says the most frequent token of the training text everywhere. `guess` has the true tokens before each
position, which is more than an attack has, and says what the language model holds for the likeliest next one.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.cut import CutModel, forward
from splitlearn.privacy.training_text import training_text
from splitlearn.stages import loading
from splitlearn.stages.settings import LoadSettings

BASELINES = ("frequent", "guess")


class Baselines:
    """The guesses for one model."""

    def __init__(self, files: ModelFiles, dtype: str) -> None:
        self._files, self._dtype = files, dtype

    def right(self, name: str, ids: Sequence[int]) -> int:
        """How many of the prompt's `ids` the baseline `name` guesses."""
        return ids.count(self._frequent) if name == "frequent" else self._guessed(ids)

    @cached_property
    def _frequent(self) -> int:
        tokens = Tokens.load(self._files.folder, use_fast=True)
        ((token, _),) = Counter(tokens.encode(training_text(), chat=False)).most_common(1)
        return token

    @cached_property
    def _model(self) -> CutModel:
        (spec,) = loading.full_specs(self._files.n_layers)
        placement = loading.Placement.of("cpu", self._dtype)
        return loading.load(self._files, [spec], LoadSettings(assign_weights=True), placement).stages[0].cut

    def _guessed(self, ids: Sequence[int]) -> int:
        """The first token has no guess."""
        if len(ids) < 2:
            return 0
        truth = torch.tensor(ids)
        with torch.inference_mode():
            logits = forward(self._model, truth[:-1].unsqueeze(0), 0, None)[0]
        return int((logits.argmax(1) == truth[1:]).sum())
