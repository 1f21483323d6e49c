"""torch.compile of a stage: whole, or layer by layer, where what is compiled for one serves all that are like it.

A whole stage takes minutes to compile for 30 layers, a single layer takes seconds. One compiled layer serves all if all
are called alike. Layers differ in their number, by which each finds its own entry in the cache. So here every layer
gets the number 0, and a hook hands it a cache of one layer, its own. Layers that use their number for more change the
stage's output; such a stage is compiled whole.
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

# Of one piece of code: first and later pieces of a prompt, a single token, each in every kind of cache and of layer.
MOST_VARIANTS = 64


def compile_stage(cut: CutModel) -> CutModel:
    """The stage, compiled when it is first called: by layers on a GPU, whole on a CPU.

    Before compiled code is run, what it was compiled for is checked, in 0.05 ms, which a recording leaves out
    (stages/cuda_graph.py). On a CPU 30 such checks take what compiling gains: SmolLM2-135M in float32 on one thread
    takes 40.5 ms a token, 42.0 compiled by layers in 7 s, 39.7 compiled whole in 61 s.
    """
    on_cpu = next(cut.module.parameters()).device.type == "cpu"
    return compile_whole(cut) if on_cpu else compile_by_layers(cut)


def compile_whole(cut: CutModel) -> CutModel:
    """Compile what the stage's module does, all layers in a row."""
    _compile([cut.module])
    return replace(cut, compiled="whole")


def compile_by_layers(cut: CutModel) -> CutModel:
    """Compile each layer by itself; the whole stage where its layers need their number."""
    layers = list(layers_of(cut))
    if len(layers) < 2 or not _become_alike(cut, layers):
        return compile_whole(cut)
    _compile(layers)
    return replace(cut, compiled="by layers")


def _compile(modules: Sequence[nn.Module]) -> None:
    """The forwards of `modules` alone: hooks, which are not alike, stay outside."""
    private_apis.allow_variants(MOST_VARIANTS)
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
        undo.callback(layer.register_forward_pre_hook(partial(_hand_own, number), with_kwargs=True).remove)
        for module, name in product(layer.modules(), LAYER_NUMBERS):
            if isinstance(own := getattr(module, name, None), int):
                undo.callback(setattr, module, name, own)
                setattr(module, name, 0)


def _hand_own(
    number: int, layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with a cache of one layer, that of `number`, in the place of the stage's."""

    def own(value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        while value.layer_class_to_replicate is not None and len(value.layers) <= number:
            value.layers.append(value.layer_class_to_replicate())
        return Cache(layers=[value.layers[number]])

    return tuple(map(own, positional)), {name: own(value) for name, value in named.items()}
