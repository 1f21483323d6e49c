"""A fake of CUDA graphs for machines without a GPU: records the operations of a call, and repeats them on the same
memory.

As in a CUDA graph, Python numbers keep their values, and every result keeps its address. To read a tensor's value is an
error, as it is during a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Body = Callable[[], torch.Tensor]
VALUES = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
Step = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class _RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in VALUES:
            raise RuntimeError("a value was read while operations are recorded")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out


def record(body: Body) -> Body:
    """Call `body` once, and return a function that repeats its operations."""
    recording = _RecordingMode()
    with recording:
        out = body()

    def replay() -> torch.Tensor:
        with torch.no_grad():
            for func, args, kwargs, before in recording.steps:
                _write(func(*args, **kwargs), before)
        return out

    return replay


def _write(found: Any, before: Any) -> None:
    for new, old in zip(tree_flatten(found)[0], tree_flatten(before)[0], strict=True):
        if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)
