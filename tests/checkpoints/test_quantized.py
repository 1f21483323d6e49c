"""Checkpoints in 4 bits of GPTQ and AWQ: the weights are those of the published formula, and hostile ones are named.

The checkpoints are packed here as AutoGPTQ and AutoAWQ do it, value by value.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitlearn.checkpoints import catalogue, convert
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import ModelConfig
from splitlearn.errors import ModelError
from splitlearn.kernels.block_format import from_blocks, to_blocks
from splitlearn.runtime.progress import silent
from tests.support.tiny import make_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FORMS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, one group": GPTQ | {"group_size": -1},
    "gptq, act order": GPTQ | {"desc_act": True},
    "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "awq": AWQ,
}
AWQ_PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYER = "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Folder:
    """A quantized checkpoint, and the matrices that it stands for."""

    path: Path
    matrices: dict[str, Tensor]


def packed(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[a, b] of 0 to 15 to int32 [a, b / 8]: the lowest four bits are the value at order[0] of its eight."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for at, which in enumerate(order):
        words |= values[:, which::8].long() << 4 * at
    return (words - (words >= 2**31).long() * 2**32).int()


def quantized(shape: torch.Size, form: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random matrix [out, in] in `form`, and the matrix."""
    (n_out, n_in), awq = shape, form["quant_method"] == "awq"
    size = n_in if form["group_size"] == -1 else form["group_size"]
    group = torch.arange(n_in) // size
    if form.get("desc_act"):
        group = group[torch.randperm(n_in, generator=generator)]
    q = torch.randint(16, (n_in, n_out), generator=generator)
    z = torch.randint(1, 16, (n_in // size, n_out), generator=generator)
    scales = torch.rand(n_in // size, n_out, generator=generator).mul(0.02).add(0.01).half()
    matrix = (scales[group].float() * (q - z[group])).T.contiguous()
    order = AWQ_PACK_ORDER if awq else tuple(range(8))
    stored = z if awq or form.get("checkpoint_format") == "gptq_v2" else z - 1
    parts = {"qzeros": packed(stored, order), "scales": scales}
    parts["qweight"] = packed(q, order) if awq else packed(q.T).T.contiguous()
    return parts if awq else {**parts, "g_idx": group.int()}, matrix


def make(folder: Path, plain: Path, form: dict[str, Any]) -> Folder:
    """The model `plain` with random matrices in `form`."""
    shutil.copytree(plain, folder)
    generator, matrices, weights = torch.Generator().manual_seed(0), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "proj" not in name:
            weights[name] = tensor
            continue
        parts, matrices[name] = quantized(tensor.shape, form, generator)
        weights |= {f"{name.removesuffix('weight')}{part}": each for part, each in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, quantization_config=form)
    return Folder(folder, matrices)


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "model", n_layers=2, **SIZES)


@pytest.fixture(autouse=True)
def own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions happen in this process, into a cache folder of the test's own."""
    monkeypatch.setattr(convert, "convert_in_subprocess", convert.convert)


def prepare(folder: Path) -> ModelFiles:
    return catalogue.prepare(ModelConfig(name=str(folder)), silent)


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        prepare(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_published_formula(plain: Path, tmp_path: Path, form: str) -> None:
    folder = make(tmp_path / "model", plain, FORMS[form])
    files = prepare(folder.path)
    found, others = load_file(files.weights), load_file(plain / "model.safetensors")
    assert found.keys() == others.keys()
    assert all(torch.equal(tensor, {**others, **folder.matrices}[name]) for name, tensor in found.items())
    assert "quantization_config" not in json.loads(files.config.read_text())


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_blocks_of_4_bits_keep_the_values_of_groups_that_blocks_divide(form: str) -> None:
    _, matrix = quantized(torch.Size([64, 96]), FORMS[form], torch.Generator().manual_seed(0))
    again = from_blocks(to_blocks(matrix, 4), 64, 96)
    step = 0.01  # the least scale
    assert (again - matrix).abs().max() < 0.05 * step


def test_a_sharded_checkpoint_is_read(plain: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", plain, AWQ)
    whole = folder.path / "model.safetensors"
    weights, where = load_file(whole), dict[str, str]()
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: tensor for at, (name, tensor) in enumerate(weights.items()) if at % 2 + 1 == number}
        save_file(part, folder.path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    whole.unlink()
    (folder.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    found = load_file(prepare(folder.path).weights)
    assert all(torch.equal(found[name], matrix) for name, matrix in folder.matrices.items())


def test_an_lm_head_in_4_bits_is_used_although_the_config_ties_it(plain: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", plain, GPTQ)
    path = folder.path / "model.safetensors"
    weights = load_file(path)
    parts, matrix = quantized(weights["model.embed_tokens.weight"].shape, GPTQ, torch.Generator().manual_seed(1))
    save_file({**weights, **{f"lm_head.{part}": each for part, each in parts.items()}}, path)
    files = prepare(folder.path)
    assert torch.equal(load_file(files.weights)["lm_head.weight"], matrix)
    assert not json.loads(files.config.read_text())["tie_word_embeddings"]


def test_zeros_for_a_bias_that_the_model_does_not_have_are_left_out(plain: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", plain, GPTQ)
    path = folder.path / "model.safetensors"
    weights, bias = load_file(path), f"{LAYER}.bias"
    save_file({**weights, bias: torch.zeros(96, dtype=torch.float16)}, path)
    prepare(folder.path)
    save_file({**weights, bias: torch.ones(96, dtype=torch.float16)}, path)
    assert bias in refused(folder.path)


@pytest.mark.parametrize(
    ("part", "edit", "says"),
    [
        ("qweight", lambda each: each[:-1], "qweight with [56, 96] values in the place of [64, 96]"),
        ("qzeros", lambda each: each[:, :-1], "qzeros with [2, 88] values in the place of [2, 96]"),
        ("scales", lambda each: each[:1], "scales with [1, 96] values in the place of [2, 96]"),
        ("scales", lambda each: each.int(), "scales (I32) in the place of"),
        ("g_idx", lambda each: each[:-1], "g_idx with [63] values in the place of [64]"),
        ("g_idx", lambda each: each + 1, "g_idx with groups from 1 to 2 in the place of 0 to 1"),
        ("g_idx", lambda each: each - 1, "g_idx with groups from -1 to 0 in the place of 0 to 1"),
        ("qzeros", None, "qweight without .qzeros"),
        ("qweight", None, "lacks 1 of its model's tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    plain: Path, tmp_path: Path, part: str, edit: Callable[[Tensor], Tensor] | None, says: str
) -> None:
    folder = make(tmp_path / "model", plain, GPTQ).path
    weights = load_file(folder / "model.safetensors")
    tensor = weights.pop(f"{LAYER}.{part}")
    if edit is not None:
        weights[f"{LAYER}.{part}"] = edit(tensor).contiguous()
    save_file(weights, folder / "model.safetensors")
    said = refused(folder)
    assert LAYER in said
    assert says in said


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (GPTQ | {"bits": 8}, "bits 8 of its quantization_config cannot be read; expected 4"),
        (GPTQ | {"bits": None}, "bits None"),
        (GPTQ | {"group_size": 0}, "group_size 0"),
        (GPTQ | {"group_size": "32"}, "group_size '32'"),
        (GPTQ | {"group_size": 16}, "values in the place of [4, "),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (AWQ | {"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not read here. What works:"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors' is not read here"),
        ({"quant_method": ["gptq"]}, "['gptq'] is not read here"),
    ],
)
def test_a_quantization_that_is_not_read_is_named(plain: Path, tmp_path: Path, form: dict[str, Any], says: str) -> None:
    folder = make(tmp_path / "model", plain, GPTQ).path
    configure(folder, quantization_config=form)
    assert says in refused(folder)


def test_sizes_of_another_model_are_refused_before_memory_is_taken(plain: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", plain, GPTQ).path
    configure(folder, intermediate_size=10**12)
    assert f"in the place of [64, {10**12}]" in refused(folder)
