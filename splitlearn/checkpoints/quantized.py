"""Reads checkpoints whose matrices GPTQ or AWQ has rounded to 4 bits, one tensor after the other, into float32.

    opened = open_folder(folder, quantization)    # its model, without memory for the weights; all shapes are checked
    tied = opened.write(target, progress)         # the safetensors file with the weights

Of a matrix `NAME.weight` [out, in] such a checkpoint has, in the layouts that AutoGPTQ and AutoAWQ write:

    NAME.qweight   int32, each eight values q: of GPTQ [in / 8, out], neighbouring inputs together; of AWQ [in, out / 8]
    NAME.qzeros    int32 [groups, out / 8], each eight zero points z; of the layout gptq less 0x11111111
    NAME.scales    float [groups, out]
    NAME.g_idx     int32 [in], the group of each input, in some of GPTQ; else group_size neighbours are one

A weight is scales[g, o] * (q[o, i] - z[g, o]), where g is the group of the input i.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from splitlearn.checkpoints.configuration import AWQ, GPTQ, Quantization
from splitlearn.checkpoints.conformance import first_few, plain_model, refuse_missing, refuse_unused
from splitlearn.checkpoints.inspection import FLOATS, weight_files
from splitlearn.checkpoints.shards import config_of
from splitlearn.checkpoints.weights_file import PIECE_BYTES, VALUE_BYTES, write_in_turn
from splitlearn.errors import ModelError
from splitlearn.models.tensors import stored_shapes, tied_names
from splitlearn.runtime import private_apis
from splitlearn.runtime.progress import Progress, Step

EACH = 8
"""Values of 4 bits in an int32."""
IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of an int32, counted from the lowest, the first value has, the second, and so on."""
ONES = np.uint32(0x11111111)
QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
PARTS = (QWEIGHT, QZEROS, SCALES, G_IDX)
INTS = ("I32",)


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, not read. `dtype` is safetensors' name of it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> NDArray[Any]:
        """Its values; those of a float in float32."""
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        found: NDArray[Any] = (tensor.float() if self.dtype in FLOATS else tensor).numpy()
        return found


@dataclass(frozen=True)
class QuantizedModel:
    """A checkpoint and its model, whose weights take no memory. `parts` are the stored tensors of which each tensor of
    the model is made: by PARTS, or plain ones by an empty name. `unused` have no place in the model."""

    model: Any
    parts: Mapping[str, Mapping[str, Stored]]
    unused: set[str]
    quantization: Quantization

    def write(self, to: Path, progress: Progress) -> dict[str, str]:
        """Write the weights to the safetensors file `to`, each once. Returns the names of tied ones, each with the one
        under which it is stored."""
        shapes = stored_shapes(self.model)
        write_in_turn(shapes, self._arrays(shapes, progress), to)
        return tied_names(self.model)

    def _arrays(self, shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> Iterator[tuple[str, Any]]:
        for number, (name, shape) in enumerate(shapes.items()):
            progress(Step("Reading the weights", number, len(shapes)))
            arrays = {part: stored.read() for part, stored in self.parts[name].items()}
            yield name, arrays[""] if "" in arrays else dequantized(arrays, shape, self.quantization)
        progress(Step("Reading the weights", len(shapes), len(shapes)))


def open_folder(folder: Path, quantization: Quantization) -> QuantizedModel:
    """The model in `folder`. Raises ModelError for tensors that are missing, too many, or of another shape or dtype
    than its config.json says."""
    stored = _stored(folder)
    made_of: dict[str, dict[str, Stored]] = {}
    for name, each in stored.items():
        base, _, last = name.rpartition(".")
        part = f".{last}" if f".{last}" in PARTS and f"{base}{QWEIGHT}" in stored else ""
        made_of.setdefault(f"{base}.weight" if part else name, {})[part] = each
    config = config_of(folder)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float32
    model = plain_model(config)
    names = private_apis.checkpoint_names(model, made_of)
    parts = {names[name]: each for name, each in made_of.items()}
    for name, first in tied_names(model).items():
        if {name, first} <= parts.keys():  # the LM head has weights of its own
            config.tie_word_embeddings = False
            model = plain_model(config)
        elif name in parts:
            parts[first] = parts.pop(name)
    wanted = stored_shapes(model)
    unused = {name for name in private_apis.unplaced(model, parts) if not _is_no_bias(name, parts)}
    report = {"missing_keys": wanted.keys() - parts.keys(), "mismatched_keys": [], "unexpected_keys": unused}
    refuse_missing(folder, report)
    refuse_unused(folder, model, report)
    odd = [wrong for name, shape in wanted.items() for wrong in _odd(parts[name], shape, quantization)]
    if odd:
        raise ModelError(f"{folder} could not be loaded: {first_few(odd)}.")
    return QuantizedModel(model, parts, unused, quantization)


def dequantized(
    parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...], quantization: Quantization
) -> NDArray[np.float32]:
    """The matrix [out, in] in float32 of `parts` by PARTS, some outputs at a time."""
    (n_out, n_in), awq = shape, quantization.layout == AWQ
    order, qweight, zeros, scales = AWQ_ORDER if awq else IN_ORDER, *(parts[part] for part in PARTS[:3])
    if quantization.layout == GPTQ:
        zeros = (zeros.view(np.uint32) + ONES).view(np.int32)
    group = parts.get(G_IDX, np.arange(n_in) // (quantization.group_size or n_in))
    values = np.empty(shape, np.float32)
    step = EACH * max(1, PIECE_BYTES // (VALUE_BYTES * n_in * EACH))
    for start in range(0, n_out, step):
        own, packed = slice(start, start + step), slice(start // EACH, (start + step) // EACH)
        q = _unpacked(qweight[:, packed], order).T if awq else _unpacked(qweight[:, own].T, order)
        z = _unpacked(zeros[:, packed], order).T
        values[own] = (q - z[:, group]) * scales.T[own, group]
    return values


def _unpacked(packed: NDArray[np.int32], order: tuple[int, ...]) -> NDArray[np.int8]:
    """[a, b] to [a, 8 b]: the four bits of each value."""
    bits: NDArray[np.int8] = (packed[..., None] >> (4 * np.array(order)) & 15).astype(np.int8)
    return bits.reshape(len(packed), -1)


def _stored(folder: Path) -> dict[str, Stored]:
    found = {}
    for file in weight_files(folder):
        path = (folder / file).resolve()
        with safe_open(path, "np") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                found[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return found


def _is_no_bias(name: str, parts: Mapping[str, Mapping[str, Stored]]) -> bool:
    """True for the zeros that early versions of AutoGPTQ wrote for each quantized layer without a bias."""
    base, _, last = name.rpartition(".")
    return last == "bias" and QWEIGHT in parts.get(f"{base}.weight", {}) and not parts[name][""].read().any()


def _odd(parts: Mapping[str, Stored], shape: tuple[int, ...], quantization: Quantization) -> Iterator[str]:
    """What is wrong with the shapes and dtypes of the `parts` of a tensor of `shape`."""
    if "" in parts:
        yield from _differ(parts[""], shape, FLOATS)
        if len(parts) > 1:
            yield f"{parts[''].name} beside {parts[QWEIGHT].name}"
        return
    if lacks := [part for part in (QZEROS, SCALES) if part not in parts]:
        yield f"{parts[QWEIGHT].name} without {' and '.join(lacks)}"
        return
    if len(shape) != 2:
        yield f"{parts[QWEIGHT].name} in the place of {list(shape)}"
        return
    n_out, n_in = shape
    groups = -(-n_in // (quantization.group_size or n_in))
    yield from _differ(parts[QWEIGHT], (n_in, n_out), INTS, 1 if quantization.layout == AWQ else 0)
    yield from _differ(parts[QZEROS], (groups, n_out), INTS, 1)
    yield from _differ(parts[SCALES], (groups, n_out), FLOATS)
    if G_IDX in parts:
        yield from tuple(_differ(parts[G_IDX], (n_in,), INTS)) or _outside(parts[G_IDX], groups)


def _outside(stored: Stored, groups: int) -> Iterator[str]:
    """What is wrong with the groups in a tensor of them."""
    found = stored.read()
    if found.min() < 0 or found.max() >= groups:
        yield f"{stored.name} with groups from {found.min()} to {found.max()} in the place of 0 to {groups - 1}"


def _differ(
    stored: Stored, shape: tuple[int, ...], dtypes: tuple[str, ...], packed: int | None = None
) -> Iterator[str]:
    """What is wrong with a tensor that should hold values of `shape`, EACH of them in one along the axis `packed`."""
    held = tuple(size * EACH if axis == packed else size for axis, size in enumerate(stored.shape))
    if stored.dtype not in dtypes:
        yield f"{stored.name} ({stored.dtype}) in the place of {' or '.join(dtypes)}"
    elif held != shape:
        yield f"{stored.name} with {list(held)} values in the place of {list(shape)}"
