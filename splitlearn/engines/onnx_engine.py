"""Computes a stage with ONNX Runtime, from a graph that is exported once (onnx_export.py) and the stage's own weights.

`of(eager, files, weight_bits)` makes the engine, and compares it with the model's own forward (stages/verify.py) before
it is used. One with weights in 8 or 4 bits is made of the same graph, after that check (onnx_rounding.py).
torch's weights are then released: ONNX Runtime keeps matrices in an order of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.engines import onnx_export, onnx_files, onnx_rounding
from splitlearn.engines.onnx_attention import padded
from splitlearn.errors import FamilyRefused
from splitlearn.kvcache.layers import ReservedCache, ReservedLayer
from splitlearn.kvcache.pool import KVShape, shapes_of
from splitlearn.models.cut import CutModel, example
from splitlearn.runtime.process import trim_heap
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import EagerEngine
from splitlearn.stages.verify import SESSION_TOKENS, Candidate, reason_against

Shapes = Sequence[tuple[KVShape, KVShape]]
FULL_BITS = 32


def of(eager: EagerEngine, files: ModelFiles, weight_bits: int | None) -> "OnnxEngine":
    """The engine of a stage that has its weights, which the stage then loses.

    `weight_bits` 8 or 4 rounds those of linear layers; of the LM head to 8. Raises FamilyRefused for layers that cannot
    be exported, or of which the graph computes something else.
    """
    cut = eager.cut
    try:
        shapes = shapes_for(cut)
        graph = onnx_files.kept(files, onnx_files.Origin.of(cut, files), partial(onnx_export.export, cut, shapes))
        engine = _made(eager, shapes, graph, onnx_export.weights(graph, cut))
    except Exception as error:  # the exporter and ONNX Runtime fail in their own ways
        raise _refused(cut, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if reason := reason_against(cut, _candidate(engine)):
        raise _refused(cut, reason)
    if weight_bits is not None and weight_bits < FULL_BITS:
        del engine
        rounded = onnx_rounding.rounded(graph, onnx_export.weights(graph, cut), weight_bits, onnx_export.head_of(cut))
        engine = _made(eager, shapes, *rounded)
    for parameter in cut.module.parameters():
        parameter.data = parameter.data.new_empty(0)
    trim_heap()
    return engine


def _made(eager: EagerEngine, shapes: Shapes, graph: bytes, weights: dict[str, NDArray[Any]]) -> "OnnxEngine":
    packed = onnx_export.packed(graph)
    least = min(packed, key=lambda name: weights[name].nbytes, default=None)
    own = weights if least is None else weights | {least: weights[least].copy()}
    session, threads = _session(graph, own), torch.get_num_threads()
    if least is not None:
        own[least].fill(0)  # if the session had not packed the matrices, the check by `of` would see this
    read = {name: array for name, array in own.items() if name not in packed}
    return OnnxEngine(eager.cut, shapes, session, read, threads, eager.precision)


def shapes_for(cut: CutModel) -> Shapes:
    """The shapes in which keys and values of each layer are kept. Raises FamilyRefused for layers that keep something
    else."""
    return [(_shape(*pair),) * 2 for pair in shapes_of(cut, example(cut, 1))]


class OnnxCache(ReservedCache):
    """A session's cache: keys and values of each layer in one piece of memory, which the graph reads and writes."""

    def __init__(self, shapes: Shapes, max_length: int) -> None:
        super().__init__(layers=[_Layer(pair, max_length) for pair in shapes] or [ReservedLayer(max_length)])
        self.position = np.zeros((), np.int64)
        self.binding: Any = None


class _Layer(ReservedLayer):
    def __init__(self, shapes: tuple[KVShape, KVShape], max_length: int) -> None:
        super().__init__(max_length)
        self.keys, self.values = (torch.empty(1, each.heads, max_length, each.size) for each in shapes)
        self.is_initialized = True


@dataclass(frozen=True)
class OnnxEngine:
    """A stage in ONNX Runtime. `weights` is torch's memory that its session reads."""

    cut: CutModel
    shapes: Shapes
    session: Any
    weights: dict[str, NDArray[Any]]
    token_threads: int
    precision: str
    device = torch.device("cpu")
    compile_s = 0.0

    @property
    def new_cache(self) -> Callable[[int], OnnxCache]:
        """Makes a session's cache."""
        return partial(OnnxCache, self.shapes)

    def kv_shapes(self) -> Shapes:
        """What each layer keeps of a token."""
        return self.shapes

    @cached_property
    def _inputs(self) -> frozenset[str]:
        return frozenset(each.name for each in self.session.get_inputs())

    @cached_property
    def _width(self) -> int:
        """The size of the output's last dimension."""
        return int(self.session.get_outputs()[0].shape[-1])

    def compute(self, step: StageInput) -> Tensor:
        """The hidden state [1, T, H], or the logits [1, step.logits, V] of a last stage."""
        x, tokens = step.x.contiguous(), step.x.shape[1]
        cache: OnnxCache = getattr(step.session, "cache", None) or OnnxCache(self.shapes, tokens)
        if cache.binding is None:
            cache.binding = self._bound(cache)
        binding, wanted = cache.binding, tokens
        binding.bind_input("x", "cpu", 0, _dtype(x), x.shape, x.data_ptr())
        if "rows" in self._inputs:
            wanted = step.logits or tokens
            rows = np.arange(tokens - wanted, tokens)
            binding.bind_input("rows", "cpu", 0, np.int64, rows.shape, rows.ctypes.data)
        out = torch.empty(1, wanted, self._width)
        binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.data_ptr())
        cache.position[...] = step.position
        self.session.run_with_iobinding(binding)
        cache.grow(tokens)
        return out

    def _bound(self, cache: OnnxCache) -> Any:
        """A binding of what stays where it is in all steps of a session."""
        binding = self.session.io_binding()
        if "position" in self._inputs:
            binding.bind_input("position", "cpu", 0, np.int64, (), cache.position.ctypes.data)
        kept = [each for layer in cache.layers if self.shapes for each in (layer.keys, layer.values)]
        for at, each in enumerate(kept):
            binding.bind_input(f"past_{at}", "cpu", 0, np.float32, each.shape, each.data_ptr())
            binding.bind_output(f"present_{at}", "cpu", 0, np.float32, each.shape, each.data_ptr())
        return binding


def _session(graph: bytes, weights: dict[str, NDArray[Any]]) -> Any:
    """A session of ONNX Runtime with as many threads as torch has. They sleep while there is nothing to compute."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)  # for the optimizer, which would look for a file
    for name, value in zip(weights, values, strict=True):
        options.add_initializer(name, value)  # for the session, which would else copy each
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _candidate(engine: OnnxEngine) -> Candidate:
    """The engine's steps, over caches of its own, for a check against the stage's own forward."""
    caches: dict[int, OnnxCache] = {}

    def compute(steps: Sequence[StageInput]) -> list[Tensor]:
        found = []
        for step in steps:
            cache = caches.setdefault(id(step.session), engine.new_cache(SESSION_TOKENS))
            found.append(engine.compute(replace(step, session=replace(step.session, cache=cache))))
        return found

    return compute


def _shape(keys: KVShape, values: KVShape) -> KVShape:
    """The shape in which keys and values of a layer are kept: the operator has one for both."""
    return padded(KVShape(keys.heads, max(keys.size, values.size)))


def _dtype(x: Tensor) -> Any:
    return np.int64 if x.dtype == torch.int64 else np.float32


def _refused(cut: CutModel, reason: str) -> FamilyRefused:
    name = type(cut.module).__name__
    return FamilyRefused(f"engine: ONNX Runtime cannot compute the layers [{cut.start}, {cut.end}) of {name}: {reason}")
