"""Tensors that stay in a file: what was learnt of a cut is there the next time."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def kept(path: Path, learn: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Those in `path`, else those that `learn` gives, which are then there. A folder that cannot be written is left
    without, and a damaged file is written anew."""
    try:
        return dict(load_file(path))
    except Exception:  # safetensors does not export its own error classes
        found = learn()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, made)
            made.replace(path)
    return found
