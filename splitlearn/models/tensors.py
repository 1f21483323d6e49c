"""A model without its weights, and the names of the tensors that a part of it has."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.initialization import no_init_weights

from splitlearn.models.cut import CutModel, carve
from splitlearn.models.part import Part
from splitlearn.runtime import private_apis


def empty_model(config: Any, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `config`; its parameters take no memory, its computed buffers (rotary frequencies) are real."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return private_apis.new_causal_model(architecture, config, attention, dtype).eval()


def tensor_names(config: Any, part: Part, n_layers: int) -> set[str]:
    """The names in the whole model's state dict of the tensors that `part` has; a tied one has its stored name."""
    cuts = [_cut(config, start, end) for start, end in part.layers]
    if part.ends:
        cuts += [_cut(config, 0, 0, first=True), _cut(config, n_layers, n_layers, last=True)]
    return {cut.full_name(name) for cut in cuts for name in cut.module.state_dict()}


def _cut(config: Any, start: int, end: int, *, first: bool = False, last: bool = False) -> CutModel:
    return carve(empty_model(config), start, end, first=first, last=last)
