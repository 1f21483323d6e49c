"""Numbers that are not finite: how a stage's output is checked, and where in the stage they began.

A check is one sum of what is there anyway. Only when that is not finite is the step repeated to find the place.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from splitlearn.errors import NotFinite
from splitlearn.models.cut import CutModel, body_of, eagerly, layers_of
from splitlearn.stages.base import StageInput
from splitlearn.wire.codec import where_not_finite

HALF_MOST = 65504
HELP_HALF = f"float16 holds numbers up to {HALF_MOST} only: set model.dtype to bfloat16 or float32"


def wrong_place(x: Tensor, *, logits: bool) -> tuple[int, float] | None:
    """The first row of `x` [1, T, N] that cannot be used, and a value in it that shows why; None when all can.

    Of a hidden state each number must be finite. Of logits -inf is a token that a model masks: wrong are NaN, +inf, and
    rows that mask every token. (The largest of a row is finite in no such case.)
    """
    if not logits:
        return where_not_finite(x)
    if math.isfinite(x.sum().item()):
        return None
    largest = x[0].amax(-1)
    rows = (~largest.isfinite()).nonzero()
    return (int(rows[0]), float(largest[rows[0]])) if len(rows) else None


def check(cut: CutModel, dtype: torch.dtype, item: StageInput, x: Tensor, again: Callable[[], object]) -> None:
    """Raise NotFinite that says where it began, and what helps, if `x`, the output for `item`, cannot be used.

    `again` repeats the step, from the cache as it was before it.
    """
    wrong = wrong_place(x, logits=cut.last)
    if wrong is None:
        return
    row, value = wrong
    position = item.position + item.x.shape[1] - x.shape[1] + row
    found = first_not_finite(cut, again)
    where = f"in the layers [{cut.start}, {cut.end})" if found is None else f"first in {found[0]}"
    weights = [] if found is None else _not_finite_weights(*found)
    said = f"The model's numbers are not finite: {value} at position {position}, {where}."
    if weights:
        named = ", ".join(cut.full_name(name) for name in weights[:3])
        raise NotFinite(f"{said} Its weights hold what is not finite: {named}. {_help_weights(dtype)}")
    raise NotFinite(f"{said} {_help(dtype)}")


def first_not_finite(cut: CutModel, again: Callable[[], object]) -> tuple[str, nn.Module, str] | None:
    """The first part of the stage to give a NaN or an Inf while `again` runs: what it is called (a layer by its number
    in the whole model), its module, and that module's path. None when all stay finite, or `again` cannot be run.

    In logits a masked token's -inf is none.
    """
    found: list[tuple[str, nn.Module, str]] = []

    def look(*part: Any) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if not found and wrong_place(hidden, logits=part[0] == HEAD) is not None:
                found.append(part)

        return after

    with ExitStack() as stack:
        stack.enter_context(eagerly(cut))  # compiled code passes hooks by that came after it
        for part in _parts(cut):
            stack.callback(part[1].register_forward_hook(look(*part)).remove)
        try:
            again()
        except Exception:  # a cache that cannot go back: the place stays unknown, and what went wrong is told
            return found[0] if found else None
    return found[0] if found else None


HEAD = "the LM head"


def _parts(cut: CutModel) -> Iterator[tuple[str, nn.Module, str]]:
    """All that a step goes through: what it is called, its module, and its path in the stage's."""
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
    """The names of a part's weights in which a number is not finite."""
    weights: dict[str, Tensor] = {n: tensor for n, tensor in part.named_parameters() if tensor.is_floating_point()}
    for name, module in part.named_modules():
        weight = getattr(module, "weight", None)  # of linear layers that hold theirs in another form
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
        return f"{HELP_HALF}; where the file itself holds them, take another copy of the model."
    return "Take another copy of the model: neither model.dtype bfloat16 nor float32 helps."
