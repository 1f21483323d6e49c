"""Checks a stage's output for numbers that are not finite, and finds where in the stage they began.

A check is one sum of the output. Only if the sum is not finite, the step is repeated to find the place.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from splitlearn.errors import NotFinite
from splitlearn.models.cut import CutModel, body_of, eagerly, layers_of
from splitlearn.stages.base import StageInput
from splitlearn.wire.codec import where_not_finite

MAX_HALF = 65504
HELP_HALF = f"float16 holds numbers up to {MAX_HALF} only: set model.dtype to bfloat16 or float32"


def wrong_place(x: Tensor, *, logits: bool) -> tuple[int, float] | None:
    """The first invalid row of `x` [1, T, N], and an invalid value in it; None if all rows are valid.

    In a hidden state each number must be finite. In logits -inf masks a token and is valid. NaN, +inf, and a row that
    masks every token are invalid. (In those cases the largest of the row is not finite.)
    """
    if not logits:
        return where_not_finite(x)
    if math.isfinite(x.sum().item()):
        return None
    largest = x[0].amax(-1)
    rows = (~largest.isfinite()).nonzero()
    return (int(rows[0]), float(largest[rows[0]])) if len(rows) else None


def check(cut: CutModel, dtype: torch.dtype, item: StageInput, x: Tensor, again: Callable[[], object]) -> None:
    """Raise NotFinite if `x`, the output for `item`, is invalid. The error says where that began and what helps.

    `again` repeats the step from the cache as it was before.
    """
    wrong = wrong_place(x, logits=cut.last)
    if wrong is None:
        return
    row, value = wrong
    position = item.position + item.x.shape[1] - x.shape[1] + row
    found = first_not_finite(cut, again)
    where = f"in the layers [{cut.start}, {cut.end})" if found is None else f"first in {found[0]}"
    weights = [] if found is None else _not_finite_weights(*found)
    message = f"The model's numbers are not finite: {value} at position {position}, {where}."
    if weights:
        names = ", ".join(cut.full_name(name) for name in weights[:3])
        raise NotFinite(f"{message} Its weights hold numbers that are not finite: {names}. {_help_weights(dtype)}")
    raise NotFinite(f"{message} {_help(dtype)}")


def first_not_finite(cut: CutModel, again: Callable[[], object]) -> tuple[str, nn.Module, str] | None:
    """The first part of the stage whose output is invalid while `again` runs: its name (a layer has its number in the
    whole model), its module, and the module's path. None if all outputs are valid, or if `again` cannot be run."""
    found: list[tuple[str, nn.Module, str]] = []

    def look(*part: Any) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if not found and wrong_place(hidden, logits=part[0] == HEAD) is not None:
                found.append(part)

        return after

    with ExitStack() as stack:
        stack.enter_context(eagerly(cut))  # compiled code ignores hooks registered later
        for part in _parts(cut):
            stack.callback(part[1].register_forward_hook(look(*part)).remove)
        with suppress(Exception):  # a cache that cannot be truncated: the place stays unknown, the caller still raises
            again()
    return found[0] if found else None


HEAD = "the LM head"


def _parts(cut: CutModel) -> Iterator[tuple[str, nn.Module, str]]:
    """All parts of the stage in the order of a step: name, module, and the module's path in the stage."""
    names = {id(module): name for name, module in cut.module.named_modules()}
    structure, body = cut.structure, body_of(cut)

    def at(path: str) -> nn.Module:
        module: nn.Module = body.get_submodule(path.removeprefix(f"{structure.body}."))
        return module

    entrance = (structure.embedding, *structure.before) if cut.first else ()
    exits = [path for path in (structure.norm, *structure.after) if path is not None] if cut.last else []
    parts = [("the embeddings", at(path)) for path in entrance]
    parts += [(f"layer {cut.start + index}", layer) for index, layer in enumerate(layers_of(cut))]
    parts += [("the final norm", at(path)) for path in exits]
    module: Any = cut.module
    if cut.last and (head := module.get_output_embeddings()) is not None:
        parts.append((HEAD, head))
    return ((what, part, names[id(part)]) for what, part in parts)


def _not_finite_weights(what: str, part: nn.Module, path: str) -> list[str]:
    """The names of a part's weights that hold NaN or Inf."""
    weights: dict[str, Tensor] = {n: tensor for n, tensor in part.named_parameters() if tensor.is_floating_point()}
    for name, module in part.named_modules():
        weight = getattr(module, "weight", None)  # linear layers in blocks have no such parameter
        if isinstance(weight, Tensor):
            weights.setdefault(f"{name}.weight" if name else "weight", weight)
    wrong = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    return [f"{path}.{name}" if path else name for name in wrong]


def _help(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return f"{HELP_HALF}."
    return f"model.dtype is {name}, which holds numbers up to 3e38: the weights are probably damaged; compare the file."


def _help_weights(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return f"{HELP_HALF}; if the file itself holds them, take another copy of the model."
    return "Take another copy of the model: neither model.dtype bfloat16 nor float32 helps."
