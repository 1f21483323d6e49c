"""torch.compile of a stage: whole, or layer by layer, so that all layers share the code compiled for one.

To compile 30 layers as a whole takes minutes, a single layer seconds. One compiled layer serves all if all are called
alike. But each layer has a number, by which it finds its entry in the cache. So here every layer gets the number 0, and
a hook passes it a cache of one layer, its own. If layers use their number for anything else, the stage's output
changes; such a stage is compiled whole.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from splitlearn.models.cut import LAYER_NUMBERS, CutModel, layers_of
from splitlearn.runtime import private_apis
from splitlearn.stages.base import StageInput
from splitlearn.stages.verify import own_forward, reason_against

# Variants of one function: first and later chunks of a prompt, a single token, each for every kind of cache and layer.
MAX_VARIANTS = 64


def compile_stage(cut: CutModel) -> CutModel:
    """The stage, to be compiled at its first call: by layers on a GPU, whole on a CPU.

    Each call of compiled code checks its guards, which takes 0.05 ms. A CUDA graph skips them (stages/cuda_graph.py).
    On a CPU 30 such checks cost as much as compiling gains: SmolLM2-135M in float32 on one thread takes 40.5 ms a
    token, 42.0 compiled by layers in 7 s, 39.7 compiled whole in 61 s.
    """
    on_cpu = next(cut.module.parameters()).device.type == "cpu"
    return compile_whole(cut) if on_cpu else compile_by_layers(cut)


def compile_whole(cut: CutModel) -> CutModel:
    """Compile the stage's module as a whole, all layers in one graph."""
    _compile([cut.module])
    return replace(cut, compiled="whole")


def compile_by_layers(cut: CutModel) -> CutModel:
    """Compile each layer by itself; the whole stage if its layers need their number."""
    layers = list(layers_of(cut))
    if len(layers) < 2 or not _become_alike(cut, layers):
        return compile_whole(cut)
    _compile(layers)
    return replace(cut, compiled="by layers")


def _compile(modules: Sequence[nn.Module]) -> None:
    """Compile the forwards of `modules` only: hooks differ between layers and stay outside."""
    private_apis.allow_variants(MAX_VARIANTS)
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)


def _become_alike(cut: CutModel, layers: Sequence[nn.Module]) -> bool:
    """Give all layers the number 0 and a cache of their own, if their outputs stay the same."""

    def alike(steps: Sequence[StageInput]) -> list[torch.Tensor]:
        with ExitStack() as undo:
            _renumber(layers, undo)
            return [own_forward(cut, step) for step in steps]

    if reason_against(cut, alike) is not None:
        return False
    _renumber(layers, ExitStack())
    return True


def _renumber(layers: Sequence[nn.Module], undo: ExitStack) -> None:
    for number, layer in enumerate(layers):
        undo.callback(layer.register_forward_pre_hook(partial(_with_own_cache, number), with_kwargs=True).remove)
        for module, name in product(layer.modules(), LAYER_NUMBERS):
            if isinstance(own := getattr(module, name, None), int):
                undo.callback(setattr, module, name, own)
                setattr(module, name, 0)


def _with_own_cache(
    number: int, layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, in which a cache of one layer, that of `number`, replaces the stage's cache."""

    def own(value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        while value.layer_class_to_replicate is not None and len(value.layers) <= number:
            value.layers.append(value.layer_class_to_replicate())
        return Cache(layers=[value.layers[number]])

    return tuple(map(own, positional)), {name: own(value) for name, value in named.items()}
