"""Where in a stage numbers stopped being finite: looked for only when a step's result was found not to be."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from splitlearn.split import CutModel, eagerly, layers_of


def first_not_finite(cut: CutModel, again: Callable[[], object]) -> int | None:
    """The layer, by its number in the whole model, that is the first to give a NaN or an Inf while `again` runs.

    `again` repeats the step that went wrong, from the cache as it was before it. None when all layers stay finite.
    """
    found: list[int] = []

    def look(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if not found and not bool(hidden.isfinite().all()):
                found.append(number)

        return after

    with ExitStack() as stack:
        stack.enter_context(eagerly(cut))  # compiled code passes hooks by that came after it
        for index, layer in enumerate(layers_of(cut)):
            stack.enter_context(layer.register_forward_hook(look(cut.start + index)))
        again()
    return found[0] if found else None
