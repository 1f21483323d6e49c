"""Model folders as people have them, and as no friend makes them: what loads, and what is said by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints import catalogue, convert
from splitlearn.checkpoints.folder import MANIFEST, ModelFiles, read_config
from splitlearn.config import ModelConfig
from splitlearn.errors import InputError, ModelError, WeightsDamaged
from splitlearn.generation.tokenizer import Tokens
from splitlearn.runtime.progress import Step, silent
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from tests.support.tiny import make_checkpoint, make_gguf
from tests.support.words import load_of, session_of

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
LAYERS = 2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("original") / "model", n_layers=LAYERS)


@pytest.fixture
def folder(original: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model to be changed; conversions happen in this process."""
    monkeypatch.setattr(convert, "convert_in_subprocess", convert.convert)
    return Path(shutil.copytree(original, tmp_path / "model"))


def prepare(path: Path | str, said: list[Step] | None = None) -> ModelFiles:
    return catalogue.prepare(ModelConfig(name=str(path)), silent if said is None else said.append)


def refused(path: Path | str, error: type[Exception] = ModelError) -> str:
    """The one line that says why the model is refused."""
    with pytest.raises(error) as caught:
        prepare(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **values}))


def reweigh(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = folder / "model.safetensors"
    save_file(edit(load_file(weights)), weights, metadata={"format": "pt"})


def shard(folder: Path) -> list[str]:
    """Put the weights into two files with an index; their names."""
    weights = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: names[number % 2] for number, name in enumerate(weights)}
    for file in names:
        part = {name: tensor for name, tensor in weights.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


def logits(files: ModelFiles, ids: torch.Tensor) -> torch.Tensor:
    """Of the last of `ids`, by this program."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    specs = loading.full_specs(files.n_layers)
    stage = loading.load(files, specs, load_of(frozenset({"low_cpu_mem_usage"})), placement).stages[0]
    with torch.no_grad():
        return stage.step([StageInput(stage.open(session_of(frozenset()), 64), 0, ids)])[0].x[0, -1]


def test_git_lfs_pointers_are_all_named_with_what_helps(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).write_text(POINTER)
    said = refused(folder)
    assert all(
        f"{name} is a git-lfs pointer" in said for name in ("model.safetensors", "tokenizer.json", "config.json")
    )
    assert f"{folder}:" in said
    assert "git lfs pull" in said


def test_pointers_in_the_place_of_shards_are_all_named(folder: Path) -> None:
    names = shard(folder)
    for name in names:
        (folder / name).write_text(POINTER)
    said = refused(folder)
    assert all(f"{name} is a git-lfs pointer" in said for name in names)


def test_shards_load_and_each_missing_one_is_named(folder: Path, original: Path) -> None:
    names = shard(folder)
    weights = load_file(prepare(folder).weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(original / "model.safetensors").items())
    for name in names:
        (folder / name).unlink()
    said = refused(folder)
    assert all(name in said for name in names)


def test_a_missing_shard_is_named_with_the_files_that_are_damaged(folder: Path) -> None:
    absent, pointer = shard(folder)
    (folder / absent).unlink()
    (folder / pointer).write_text(POINTER)
    said = refused(folder)
    assert f"{absent} is missing, and model.safetensors.index.json names it" in said
    assert f"{pointer} is a git-lfs pointer" in said


@pytest.mark.parametrize("inside", ["model", "snapshots/0123abc"])
def test_a_folder_of_folders_is_told_where_the_model_is(folder: Path, tmp_path: Path, inside: str) -> None:
    (tmp_path / "outer" / inside).parent.mkdir(parents=True)
    folder.rename(tmp_path / "outer" / inside)
    assert refused(tmp_path / "outer").endswith(f"What is in it: {tmp_path / 'outer' / inside}.")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", 5, None])
def test_an_index_names_no_file_outside_the_folder(folder: Path, name: object) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"may name .safetensors files beside it only, and names {name!r}" in refused(folder)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", b"<html>Sign in</html>", "model.safetensors cannot be read as safetensors"),
        ("model.safetensors", b"", "model.safetensors cannot be read as safetensors"),
        ("config.json", b"[" * 100_000, "config.json cannot be read as JSON"),
        ("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "config.json cannot be read as JSON"),
        ("tokenizer.json", b'{"version": ', "tokenizer.json cannot be read as JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json cannot be read"),
        ("generation_config.json", b"{", "generation_config.json cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, file: str, content: bytes, says: str) -> None:
    (folder / file).write_bytes(content)
    assert says in refused(folder)


def test_weights_that_are_cut_short_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} cannot be read as safetensors" in refused(folder)


def test_what_is_no_file_is_not_opened(folder: Path) -> None:
    for name in ("generation_config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).unlink()
    os.mkfifo(folder / "generation_config.json")
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")
    said = refused(folder)
    assert "generation_config.json is no regular file" in said
    assert "tokenizer.json cannot be read (Too many levels of symbolic links)" in said
    assert "model.safetensors is a link to a file that is not there" in said


@pytest.mark.parametrize(
    ("without", "says"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json"], "has no tokenizer"),
        (["model.safetensors"], "has no safetensors weights"),
    ],
)
def test_what_a_folder_lacks_is_said(folder: Path, without: list[str], says: str) -> None:
    for name in without:
        (folder / name).unlink()
    assert says in refused(folder)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model.fp16.safetensors", "consolidated.00.pth"])
def test_weights_that_cannot_be_loaded_are_named(folder: Path, other: str) -> None:
    (folder / "model.safetensors").rename(folder / other)
    assert other in refused(folder)


def test_a_sentence_transformers_model_is_told_what_it_is(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    assert "sentence-transformers" in refused(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),  # which would be left out
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),  # which would be made up
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 10**12}, "model.norm.weight [48] in the place of [1000000000000]"),
        ({"quantization_config": {"quant_method": "nonsense"}}, "'nonsense'"),
        ({"quantization_config": 4}, "quantization 4"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"transformers_weights": "../../x.safetensors"}, "transformers_weights '../../x.safetensors'"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(folder: Path, values: dict[str, Any], says: str) -> None:
    change(folder / "config.json", **values)
    if "hidden_size" in values:
        assert "model.embed_tokens.weight [400, 48] in the place of [400, 1000000000000]" in refused(folder)
    else:
        assert says in refused(folder)


BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda weights: {**weights, BIAS: torch.ones(48)}, [BIAS]),
        (lambda weights: {**weights, "x.lora_A.weight": torch.ones(4, 48)}, ["x.lora_A.weight"]),
        (
            lambda weights: {name.replace("up_proj", "w1"): tensor for name, tensor in weights.items()},
            ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.w1.weight"],
        ),
        (lambda weights: {**weights, "model.norm.weight": torch.ones(40)}, ["model.norm.weight [40]", "[48]"]),
        (lambda weights: {name: tensor.to(torch.int8) for name, tensor in weights.items()}, ["(I8)"]),
    ],
    ids=["a bias", "an adapter's", "renamed", "another shape", "quantized"],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, edit: Any, names: list[str]) -> None:
    reweigh(folder, edit)
    said = refused(folder)
    assert all(name in said for name in names)


def test_what_has_no_effect_is_told(folder: Path) -> None:
    reweigh(folder, lambda weights: {**weights, "v_head.summary.weight": torch.ones(1, 48)})
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    change(folder / "generation_config.json", repetition_penalty=1.3)
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "for-poems").mkdir()
    change(folder / "for-poems" / "adapter_config.json", peft_type="LORA")
    said: list[Step] = []
    prepare(folder, said)
    told = " ".join(step.label for step in said)
    assert "v_head.summary.weight" in told
    assert "LlamaForCausalLM of transformers takes its place" in told
    assert "repetition_penalty 1.3" in told
    assert "model.fp16.safetensors" in told
    assert "the adapters for-poems" in told


def test_an_lm_head_of_its_own_is_used_although_the_config_ties_it(folder: Path) -> None:
    reweigh(folder, lambda weights: {**weights, "lm_head.weight": torch.randn(400, 48, generator=torch.manual_seed(0))})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)(ids).logits[0, -1]
    assert torch.allclose(logits(prepare(folder), ids), wanted, atol=1e-4)


def test_a_config_names_no_way_to_compute(folder: Path) -> None:
    change(folder / "config.json", _attn_implementation="somebody/kernels", attn_implementation="flash_attention_2")
    files = prepare(folder)
    assert "somebody" not in files.config.read_text()
    change(files.config, _attn_implementation="somebody/kernels")
    assert read_config(files.folder)._attn_implementation is None


def test_a_gguf_file_gives_the_model_that_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "with spaces, ü"
    place.mkdir()
    file = make_gguf(place / "tiny.gguf", folder)
    by_file, by_folder, wanted = prepare(file), prepare(place), prepare(folder)
    assert by_file.folder == by_folder.folder
    have, weights = load_file(by_file.weights), load_file(wanted.weights)
    assert have.keys() == weights.keys()
    assert all(torch.equal(have[name], weights[name]) for name in weights)
    ours, theirs = (Tokens.load(files.folder, use_fast=True) for files in (by_file, wanted))
    assert ours.encode("The sky is 🙂.", chat=True) == theirs.encode("The sky is 🙂.", chat=True)
    assert ours.eos_ids == theirs.eos_ids


def test_a_folder_with_weights_of_both_kinds_is_the_safetensors_model(folder: Path) -> None:
    (folder / "other.gguf").write_bytes(b"GGUF")
    assert prepare(folder).source == str(folder)


def test_several_gguf_files_are_named_to_choose_from(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    said = refused(tmp_path, InputError)
    assert f"{tmp_path / 'a.gguf'}, {tmp_path / 'b.GGUF'}" in said


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("arch.gguf", lambda data: data.replace(b"llama", b"lxyza"), "architecture lxyza"),
        ("cut.gguf", lambda data: data[: len(data) // 2], "could not be read"),
        ("head.gguf", lambda data: data[:300], "cannot be read as a GGUF file"),
        ("many.gguf", lambda data: data[:8] + b"\xff" * 8 + data[16:], "cannot be read as a GGUF file"),
        ("other.gguf", lambda data: b"what" + data[4:], "no GGUF file"),
        ("pointer.gguf", lambda data: POINTER.encode(), "git-lfs pointer"),
        ("part-00001-of-00002.gguf", lambda data: data, "is a part of a GGUF model"),
        ("lacks.gguf", lambda data: data.replace(b"blk.1.attn_q", b"blk.1.attn_z"), "layers.1.self_attn.q_proj"),
        ("lora.gguf", lambda data: data.replace(b"general.name", b"general.type").replace(b"tiny", b"lora"), "lora"),
    ],
)
def test_a_gguf_file_that_cannot_be_used_is_named(
    folder: Path, tmp_path: Path, name: str, edit: Any, says: str
) -> None:
    whole = make_gguf(tmp_path / "whole.gguf", folder)
    (tmp_path / name).write_bytes(edit(whole.read_bytes()))
    said = refused(tmp_path / name)
    assert name in said
    assert says in said


def test_a_path_of_every_form_is_understood(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("ü" * 100)
    folder.rename(long)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {prepare(name).folder for name in (str(long), long.name, f"./{long.name}/", f"~/{long.name}")}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "says"), [("model/config.json", "another kind"), ("loop", "loop"), ("gone", "a link to nothing")]
)
def test_what_is_no_folder_is_told_so(folder: Path, name: str, says: str) -> None:
    (folder.parent / "loop").symlink_to(folder.parent / "loop")
    (folder.parent / "gone").symlink_to(folder.parent / "nowhere")
    said = refused(folder.parent / name, InputError)
    assert "model.name" in said
    assert says in said


def test_a_folder_of_this_hub_id_is_the_model_only_if_it_has_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    folder.rename("owner/name")
    assert prepare("owner/name").source == str(tmp_path / "owner" / "name")
    (tmp_path / "owner" / "name" / "config.json").unlink()
    assert "has no config.json" in refused("owner/name")


def test_a_manifest_names_no_file_outside_its_folder(folder: Path) -> None:
    files = prepare(folder)
    manifest = json.loads((files.folder / MANIFEST).read_text())
    manifest["files"]["../../outside"] = {"size": 1, "mtime_ns": 1, "sha256": "0"}
    (files.folder / MANIFEST).write_text(json.dumps(manifest))
    assert "'../../outside', which is not in the folder" in refused(files.folder, WeightsDamaged)
