"""Writes safetensors files: all tensors at once, or float32 ones in turn, so that only one is in memory."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitlearn.checkpoints.folder import ALIGNMENT

# Bytes of a tensor that are copied at once.
PIECE_BYTES = 8 << 20
# Bytes of a float32 value.
VALUE_BYTES = 4


def write_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write a safetensors file whose data begins at a multiple of ALIGNMENT, as torch's own allocations do.

    At other addresses products of float32 weights round differently (by up to 2e-5), so loading by mapping would differ
    from loading by copying.
    """
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"pad": ""})
    begin = data_offset(path)
    if begin % ALIGNMENT:  # the header's length is known only now
        save_file(tensors, path, metadata={"pad": "." * (ALIGNMENT - begin % ALIGNMENT)})
    path.chmod(0o644)  # save_file makes it readable by its owner only; containers share this folder between users


def write_in_turn(shapes: Mapping[str, Sequence[int]], arrays: Iterable[tuple[str, Any]], path: Path) -> None:
    """Write the file that `write_tensors` would write for float32 tensors of `shapes`.

    `arrays` brings each of them once, in any order, as its name and a numpy array of its shape. What it does not bring
    is zero.
    """
    header, places = _header(shapes, "")
    if begin := len(header) % ALIGNMENT:
        header, places = _header(shapes, "." * (ALIGNMENT - begin))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(end - begin for begin, end in places.values()))
        for name, array in arrays:
            file.seek(len(header) + places[name][0])
            rows = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
            for start in range(0, len(array), rows):
                file.write(np.ascontiguousarray(array[start : start + rows], np.float32).data)


def _header(shapes: Mapping[str, Sequence[int]], pad: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """All before the data, and where each tensor is in the data. In the order of safetensors: by name."""
    places, at = {}, 0
    for name in sorted(shapes):
        places[name] = (at, at := at + VALUE_BYTES * math.prod(shapes[name]))
    entries: dict[str, object] = {
        name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": place} for name, place in places.items()
    }
    text = json.dumps({"__metadata__": {"pad": pad}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def data_offset(path: Path) -> int:
    """The offset of a safetensors file's data: after the header's length (8 bytes) and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
