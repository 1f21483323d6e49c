"""Exports a stage as an ONNX graph: a function of tensors alone, without its weights.

    graph = export(cut, shapes)            # bytes of an ONNX model
    arrays = weights(graph, cut)           # what the graph calls its weights, in the order in which it reads them

The inputs are `x`, token ids int64 [1, T] or a hidden state [1, T, H]; `position` int64 [], the tokens before it; for a
last stage with layers `rows` int64 [K], the tokens whose logits are wanted; and `past_0`, `past_1` ... the cache [1,
heads, capacity, size]: keys of layer 0, values of layer 0 and so on. The outputs are `out`, a hidden state or logits,
and `present_0`, `present_1` ..., the cache with the new tokens. The LM head alone takes `x`, and gives all logits.

A matrix that torch keeps as [out, in] stays so: a product with its transpose is FUSED, of which ONNX Runtime packs the
matrix in an order of its own when a session is made. So nothing is transposed in memory here.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from splitlearn.engines import onnx_attention
from splitlearn.engines.onnx_attention import Lengths
from splitlearn.kvcache.pool import KVShape
from splitlearn.models.cut import CutModel, example, forward
from splitlearn.runtime import private_apis

WEIGHTS = "weights.bin"
"""Where a graph says that its weights are."""
FUSED, DOMAIN = "FusedMatMul", "com.microsoft"
"""ONNX Runtime's own operator for a product with a transposed matrix."""
_STAGE = "stage."
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
# What a stage is traced with. A size of 0 or 1 would become part of the graph.
TOKENS, CAPACITY, ROWS, POSITION = 5, 16, 2, 7


def export(cut: CutModel, shapes: Sequence[tuple[KVShape, KVShape]]) -> bytes:
    """The graph of a stage whose layers keep keys and values of `shapes`. Raises whatever the exporter raises for
    layers that it cannot trace."""
    inputs, names = _inputs(cut, shapes)
    outputs = ["out", *(name.replace("past", "present") for name in names if name.startswith("past"))]
    dynamic: Any = torch.export.Dim.DYNAMIC
    free = {"x": {1: dynamic}, "position": {}, "rows": {0: dynamic}}
    sizes = [free.get(name, {2: dynamic}) for name in names]
    with torch.no_grad(), _attention(cut), _quietly():
        program = torch.onnx.export(
            _AsFunction(cut, names),
            (inputs[0], inputs[1:]),
            dynamo=True,
            dynamic_shapes=(sizes[0], sizes[1:]),
            input_names=names,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert program is not None  # None is what an export to a file returns
    graph: bytes = _without_weights(program.model).SerializeToString()
    return graph


def weights(graph: bytes, cut: CutModel) -> dict[str, NDArray[Any]]:
    """The weights of the stage by the names that the graph has for them, in torch's memory where that is in order."""
    state = dict(cut.module.named_parameters(remove_duplicate=False))
    names = [
        tensor.name
        for tensor in onnx.load_model_from_string(graph).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    return {name: state[name.removeprefix(_STAGE)].detach().contiguous().numpy() for name in names}


def packed(graph: bytes) -> set[str]:
    """The matrices of which ONNX Runtime has all it needs once a session is made: nothing but FUSED reads them."""
    nodes = onnx.load_model_from_string(graph).graph.node
    matrices = {node.input[1] for node in nodes if node.op_type == FUSED}
    others = {name for node in nodes for at, name in enumerate(node.input) if (node.op_type, at) != (FUSED, 1)}
    return matrices - others


def head_of(cut: CutModel) -> str | None:
    """The name that a graph has for the LM head's matrix."""
    module: Any = cut.module
    head = module.get_output_embeddings() if cut.last else None
    named = cut.module.named_parameters(remove_duplicate=False)
    return next((f"{_STAGE}{name}" for name, each in named if head is not None and each is head.weight), None)


class _AsFunction(nn.Module):
    """A stage as a function from the tensors `names` to its output and cache."""

    def __init__(self, cut: CutModel, names: Sequence[str]) -> None:
        super().__init__()
        self.stage, self._cut, self._names = cut.module, cut, names

    def forward(self, x: Tensor, others: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in the order of the graph's."""
        given = dict(zip(self._names[1:], others, strict=True))
        if not given:
            return (forward(self._cut, x, 0, None),)
        position, past = given["position"], [each for name, each in given.items() if name.startswith("past")]
        cache = onnx_attention.cache_of(past, Lengths.after(position, x.shape[1])) if past else None
        out = forward(self._cut, x, position, cache, logits_to_keep=given.get("rows", 0))
        present = [] if cache is None else [each for layer in cache.layers for each in layer.present]
        return out, *present


def _inputs(cut: CutModel, shapes: Sequence[tuple[KVShape, KVShape]]) -> tuple[list[Tensor], list[str]]:
    """What a stage is traced with, and the names of these inputs."""
    found = {"x": example(cut, TOKENS)}
    if cut.first or shapes:
        found["position"] = torch.tensor(POSITION)
    if cut.last and shapes:
        found["rows"] = torch.arange(ROWS)
    kept = [shape for pair in shapes for shape in pair]
    found |= {f"past_{at}": torch.zeros(1, each.heads, CAPACITY, each.size) for at, each in enumerate(kept)}
    return list(found.values()), list(found)


@contextmanager
def _attention(cut: CutModel) -> Iterator[None]:
    """Inside, the stage's layers use the attention of exported stages."""
    before = [private_apis.attention_of(config) for config in cut.configs]
    try:
        for config in cut.configs:
            private_apis.set_attention(config, onnx_attention.NAME)
        yield
    finally:
        for config, name in zip(cut.configs, before, strict=True):
            private_apis.set_attention(config, name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings, which are about code and packages that are not this program's."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _without_weights(model: onnx_ir.Model) -> onnx.ModelProto:
    """The optimised model, whose weights are named and not there.

    While it is optimised they are inputs: else they would be computed with, and become part of the graph.
    """
    graph = model.graph
    parameters = [value for value in graph.initializers.values() if value.metadata_props.get(_KIND) == "PARAMETER"]
    for value in parameters:
        graph.initializers.pop(value.name)
        value.const_value = None
    graph.opset_imports.setdefault(DOMAIN, 1)
    for value in parameters:
        _fuse(value)
    graph.inputs.extend(parameters)
    onnxscript.optimizer.optimize(model)
    for value in parameters:
        graph.inputs.remove(value)
        if value.uses():
            size = int(np.prod(value.shape.numpy()) * value.dtype.itemsize)
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, 0, size, value.dtype, shape=value.shape, name=value.name
            )
            graph.register_initializer(value)
    ClearMetadataAndDocStringPass()(model)  # where in this machine's files each operation was traced
    return onnx_ir.to_proto(model)


def _fuse(weight: onnx_ir.Value) -> None:
    """Let products with the transposed matrix `weight` [out, in] read it as it is."""
    for turn in [node for node in weight.consumers() if node.op_type == "Transpose" and len(weight.shape) == 2]:
        for node in [node for node in turn.outputs[0].consumers() if node.op_type == "MatMul"]:
            node.op_type, node.domain = FUSED, DOMAIN
            node.attributes["transB"] = onnx_ir.AttrInt64("transB", 1)
            node.replace_input_with(1, weight)
        if not turn.outputs[0].uses():
            turn.graph.remove(turn, safe=True)
