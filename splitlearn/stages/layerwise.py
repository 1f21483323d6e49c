"""Layers of a model whose weights are in memory only while each of them computes."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from splitlearn.checkpoints.folder import ModelFiles, read_config
from splitlearn.models.cut import CutModel, layers_of
from splitlearn.models.plan import SplitPlan
from splitlearn.stages.engine import EagerEngine
from splitlearn.stages.loading import StageSpec, put, read_tensor, skeleton
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import LoadSettings


def trunk_layer_by_layer(files: ModelFiles, plan: SplitPlan, dtype: torch.dtype) -> LocalStage:
    """The trunk's layers as a stage on the CPU. Each layer maps its weights from the file for its own forward alone."""
    config = read_config(files.folder)
    spec = StageSpec("trunk", plan.start, plan.end)
    cut = skeleton(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, spec, LoadSettings(), dtype)
    names = {id(module): name for name, module in cut.module.named_modules()}
    for layer in layers_of(cut):
        _read_for_each_forward(cut, layer, names[id(layer)], files, dtype)
    engine = EagerEngine(cut, torch.device("cpu"), 1, torch.get_float32_matmul_precision())
    return LocalStage(engine, "trunk", dtype, files.facts.hidden_size)


def _read_for_each_forward(cut: CutModel, layer: nn.Module, path: str, files: ModelFiles, dtype: torch.dtype) -> None:
    empty = layer.state_dict(keep_vars=True)

    def fill(get: Callable[[str], torch.Tensor]) -> None:
        for name, value in empty.items():
            put(layer, name, get(name), isinstance(value, nn.Parameter))

    def before(*_: Any) -> None:
        with safe_open(files.weights, framework="pt") as weights:
            tensors = {name: read_tensor(weights, files, cut.full_name(f"{path}.{name}")) for name in empty}
        fill(lambda name: tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name])

    def after(*_: Any) -> None:
        fill(empty.__getitem__)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
