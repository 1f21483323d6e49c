"""A GGUF file is converted tensor by tensor."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints import gguf_file
from splitlearn.checkpoints.weights_file import write_in_turn, write_tensors
from splitlearn.runtime.progress import silent
from tests.support.tiny import make_checkpoint, make_gguf

# Every form of few bits that gguf can write in blocks of 32 values, and the two of 16 bits.
FORMS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")
SIZES: dict[str, object] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def stored_as(form: str, plain: Path, to: Path) -> Path:
    """The GGUF file `plain` with its matrices in another form."""
    reader, writer = GGUFReader(plain), GGUFWriter(to, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    kind = GGMLQuantizationType[form]
    for tensor in reader.tensors:
        wide = len(tensor.shape) > 1
        data = quantize(np.asarray(tensor.data), kind) if wide else np.asarray(tensor.data)
        writer.add_tensor(tensor.name, data, raw_dtype=kind if wide else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers as a GGUF file in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    return make_gguf(folder / "plain.gguf", make_checkpoint(folder / "checkpoint", "llama", 4, True, **SIZES))


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_that_transformers_reads(plain: Path, tmp_path: Path, form: str) -> None:
    path = stored_as(form, plain, tmp_path / "few.gguf")
    opened = gguf_file.open_file(path)
    assert opened is not None
    tied = opened.write(tmp_path / "model.safetensors", silent)
    found = load_file(tmp_path / "model.safetensors")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert found.keys() | tied.keys() == wanted.keys()
    assert all(torch.equal(found[tied.get(name, name)], wanted[name]) for name in wanted)


def test_a_few_tensors_are_in_memory_at_a_time(plain: Path, tmp_path: Path) -> None:
    opened = gguf_file.open_file(stored_as("Q4_1", plain, tmp_path / "few.gguf"))
    assert opened is not None
    sizes = [4 * parameter.numel() for parameter in opened.model.parameters()]
    tracemalloc.start()
    opened.write(tmp_path / "model.safetensors", silent)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) > 10 * max(sizes)
    assert most < 4 * max(sizes)


def test_tensors_that_come_in_turn_make_the_same_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(*shape) for name, shape in {"b.x": (3, 5), "a": (7,), "b.a.y": (2, 3, 4)}.items()}
    write_tensors(tensors, tmp_path / "at once")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_in_turn(shapes, [(name, tensors[name].numpy()) for name in ("b.x", "b.a.y", "a")], tmp_path / "in turn")
    assert (tmp_path / "in turn").read_bytes() == (tmp_path / "at once").read_bytes()
