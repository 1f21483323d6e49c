"""A model without its weights, and the names of the tensors that a part of it has."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.initialization import no_init_weights

from splitlearn.models.cut import CutModel, carve
from splitlearn.models.part import Part
from splitlearn.runtime import private_apis

_PATCHED = threading.Lock()
"""Held while a model is made: what changes torch for it, for the whole process, puts back what it found."""


def empty_model(config: Any, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `config`; its parameters take no memory, its computed buffers (rotary frequencies) are real."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _PATCHED, no_init_weights(), _parameters_without_memory():
        return private_apis.new_causal_model(architecture, config, attention, dtype).eval()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """As accelerate's init_empty_weights, for this thread alone: others may set parameters meanwhile."""
    own, register = threading.get_ident(), nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == own:
            attributes, param = vars(param), type(param)(param.to("meta"), requires_grad=param.requires_grad)
            vars(param).update(attributes)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def tied_names(model: Any) -> dict[str, str]:
    """The names in the state dict of tied tensors, each with the one under which it is stored."""
    state = model.state_dict()
    return {name: first for name, first in model.all_tied_weights_keys.items() if name in state}


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the state dict, tied ones once."""
    tied = tied_names(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def tensor_names(config: Any, part: Part, n_layers: int) -> set[str]:
    """The names in the whole model's state dict of the tensors that `part` has; a tied one has its stored name."""
    cuts = [_cut(config, start, end) for start, end in part.layers]
    if part.ends:
        cuts += [_cut(config, 0, 0, first=True), _cut(config, n_layers, n_layers, last=True)]
    return {cut.full_name(name) for cut in cuts for name in cut.module.state_dict()}


def _cut(config: Any, start: int, end: int, *, first: bool = False, last: bool = False) -> CutModel:
    return carve(empty_model(config), start, end, first=first, last=last)
