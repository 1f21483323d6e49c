"""A LoRA adapter beside a model, or alone: merged by peft, or refused by name."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn.checkpoints import adapter, catalogue, convert
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import ModelConfig
from splitlearn.errors import ModelError
from splitlearn.runtime.progress import silent
from tests.support.tiny import make_checkpoint, make_converted, make_gguf

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "r": 2, "lora_alpha": 6}
LORA |= {"target_modules": ["q_proj", "v_proj"]}
QUERY = "model.layers.1.self_attn.q_proj"
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a LoRA adapter of rank 2 beside it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("original") / "model", n_layers=2)
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    rng, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for name, rows in (("q_proj", 48), ("v_proj", 24)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, 48, generator=rng)
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, 2, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(convert, "convert_in_subprocess", convert.convert)
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)


def prepare(path: Path) -> ModelFiles:
    return catalogue.prepare(ModelConfig(name=str(path)), silent)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        prepare(path)
    return str(caught.value)


def configure(folder: Path, **values: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **values}))


def test_without_peft_a_model_with_an_adapter_is_refused_by_name(folder: Path, without_peft: None) -> None:
    said = refused(folder)
    assert str(folder) in said
    assert "adapter (adapter_config.json: LORA) for the model owner/base" in said
    assert "pip install peft" in said
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    prepare(folder)


def test_a_gguf_file_with_an_adapter_beside_it_is_refused_too(folder: Path, without_peft: None) -> None:
    make_gguf(folder / "tiny.gguf", folder)
    (folder / "model.safetensors").unlink()
    assert "pip install peft" in refused(folder)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_told_what_it_is_and_which_model_it_wants(folder: Path, weights: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / weights)
    said = refused(folder)
    assert "is an adapter (adapter_config.json: LORA) for the model owner/base, without that model" in said


@pytest.mark.parametrize(
    ("remove", "add", "says"),
    [
        ("adapter_config.json", None, "an adapter without its adapter_config.json"),
        ("adapter_model.safetensors", "adapter_model.bin", "there are adapter_config.json, adapter_model.bin"),
        ("adapter_model.safetensors", "adapters.safetensors", "there are adapter_config.json, adapters.safetensors"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused_by_name(folder: Path, remove: str, add: str | None, says: str) -> None:
    (folder / remove).unlink()
    if add:
        (folder / add).write_bytes(b"x")
    assert says in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my-lora.safetensors", "adapters.npz"])
def test_an_adapter_under_another_name_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / name)
    said = refused(folder)
    assert "beside the model" in said and name in said


def test_an_adapter_put_into_a_converted_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    files = make_converted(tmp_path / "converted", n_layers=2)
    (files.folder / "adapter_config.json").write_text(json.dumps(LORA))
    assert "is converted already: the adapter in it (adapter_config.json)" in refused(files.folder)


def test_what_was_converted_without_its_adapter_is_not_used_any_more(folder: Path, without_peft: None) -> None:
    kept = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    content = [path.read_bytes() for path in kept]
    for path in kept:
        path.unlink()
    alone = prepare(folder)
    for path, data in zip(kept, content, strict=True):
        path.write_bytes(data)
    assert "pip install peft" in refused(folder)
    assert alone.folder.exists()


@needs_peft
def test_peft_merges_the_adapter_into_the_weights(folder: Path) -> None:
    merged, base = load_file(prepare(folder).weights), load_file(folder / "model.safetensors")
    lora = load_file(folder / "adapter_model.safetensors")
    low, high = (lora[f"base_model.model.{QUERY}.lora_{half}.weight"] for half in "AB")
    assert torch.allclose(merged[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + 3 * high @ low, atol=1e-5)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}


@needs_peft
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "changes prompts"),
        ({"peft_type": "UNHEARD_OF"}, "UNHEARD_OF"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, "v_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(folder: Path, values: dict[str, Any], says: str) -> None:
    configure(folder, **values)
    assert says in refused(folder)
