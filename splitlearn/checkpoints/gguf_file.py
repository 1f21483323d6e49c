"""Converts a GGUF file tensor by tensor, so that one of them is in memory in float32, and not the whole model.

    opened = open_file(path)                    # its model, without memory for the weights
    tied = opened.write(target, progress)       # the safetensors file with the weights

transformers' own rules name the tensors and undo llama.cpp's order of rows (runtime/private_apis.py). Its
`from_pretrained` holds the file's tensors in float32 twice: 5 GB for a model of 1.1 billion parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from transformers import AutoConfig

from splitlearn.checkpoints.conformance import refuse_missing
from splitlearn.checkpoints.weights_file import PIECE_BYTES, write_in_turn
from splitlearn.errors import ModelError
from splitlearn.models.tensors import empty_model, stored_shapes, tied_names
from splitlearn.runtime import private_apis
from splitlearn.runtime.progress import Progress, Step


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file and its model, whose weights take no memory. `converted` makes the model's tensors of one of the
    file's, by its name there."""

    path: Path
    model: Any
    reader: Any
    converted: Callable[[str, NDArray[np.float32]], Mapping[str, Any]]

    def write(self, to: Path, progress: Progress) -> dict[str, str]:
        """Write the weights to the safetensors file `to`, each once. Returns the names of tied ones, each with the one
        under which it is stored. Raises ModelError for tensors that are missing, have another shape or cannot be read.
        """
        shapes = stored_shapes(self.model)
        left = dict(shapes)
        write_in_turn(shapes, self._arrays(left, progress), to)
        refuse_missing(self.path, {"missing_keys": left, "mismatched_keys": [], "unexpected_keys": []})
        return tied_names(self.model)

    def _arrays(self, left: dict[str, tuple[int, ...]], progress: Progress) -> Iterator[tuple[str, Any]]:
        """The tensors in `left`, each by its name, which is then taken out."""
        tensors = self.reader.tensors
        with self.path.open("rb") as file:
            for number, tensor in enumerate(tensors):
                progress(Step("Reading the weights", number, len(tensors)))
                for name, array in self._of(file, tensor).items():
                    shape = left.pop(name, None)
                    if shape is not None and shape != tuple(array.shape):
                        wrong = f"{name} {list(array.shape)} in the place of {list(shape)}"
                        raise ModelError(f"{self.path} could not be loaded: {wrong}, which is what its metadata say.")
                    if shape is not None:
                        yield name, np.asarray(array)
        progress(Step("Reading the weights", len(tensors), len(tensors)))

    def _of(self, file: IO[bytes], tensor: Any) -> Mapping[str, Any]:
        try:
            return self.converted(tensor.name, _values(file, tensor))
        except Exception as error:  # from gguf and transformers, about arbitrary files
            why = " ".join(str(error).split())[:300]
            raise ModelError(f"{self.path} could not be loaded: {tensor.name}: {why}.") from error


def open_file(path: Path) -> GgufModel | None:
    """The model of a GGUF file. None for a file that transformers must read whole: it makes one tensor of several."""
    config = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )
    model, reader = empty_model(config, "eager", torch.float32), GGUFReader(path)
    converted = private_apis.gguf_conversion(path, model)
    if converted is None or reader.byte_order != "I" or any(True for _ in _stored_buffers(model)):
        return None
    if tied_names(model) and any(tensor.name == "output.weight" for tensor in reader.tensors):
        return None  # which of the two is the LM head, only the weights say
    return GgufModel(path, model, reader, converted)


def _stored_buffers(model: Any) -> Iterator[str]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return (name for name in model.state_dict() if name not in parameters)


def _values(file: IO[bytes], tensor: Any) -> NDArray[np.float32]:
    """A tensor of the file, in float32. It is read and de-quantised some rows at a time, and not by the reader's map of
    the file, whose pages would stay in memory."""
    values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    rows = values.reshape(-1, values.shape[-1])
    size, step = tensor.n_bytes // len(rows), max(1, PIECE_BYTES // rows[:1].nbytes)
    file.seek(int(tensor.data_offset))
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        stored = np.frombuffer(file.read(size * len(piece)), np.uint8).reshape(len(piece), size)
        piece[:] = dequantize(stored, tensor.tensor_type)
    return values
