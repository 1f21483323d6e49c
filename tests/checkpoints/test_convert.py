"""What conversion writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitlearn.checkpoints import convert, folder, weights_file
from splitlearn.errors import ModelError
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.tiny import make_checkpoint, make_converted


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_the_converted_file_has_the_state_dict_of_the_model(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family)
    state = AutoModelForCausalLM.from_pretrained(files.source).state_dict()
    with safe_open(files.weights, "pt") as weights:
        stored = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - it is no mapping
    assert set(stored) | set(files.facts.tied) == set(state)
    assert all(torch.equal(state[name], stored[files.facts.tied.get(name, name)]) for name in state)
    assert all(not tensor.is_floating_point() or tensor.dtype == torch.float32 for tensor in stored.values())


def test_the_converted_folder_loads_in_transformers(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    _, report = AutoModelForCausalLM.from_pretrained(files.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert AutoTokenizer.from_pretrained(files.folder).chat_template
    assert "quantization_config" not in json.loads(files.config.read_text())


def test_the_context_of_a_model_that_has_another_name_for_it_is_known(tmp_path: Path) -> None:
    assert make_converted(tmp_path / "mpt", "mpt", n_layers=2, max_seq_len=64).facts.context_length == 64


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its model's tensors, among them model\.layers\.3"):
        convert.convert(checkpoint, tmp_path, None, silent)


def test_a_conversion_that_is_killed_says_so(tmp_path: Path) -> None:
    starter = tmp_path / "sitecustomize.py"
    starter.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ModelError, match="killed by signal 9"):
            convert.convert_in_subprocess(tmp_path, tmp_path, None, silent)


def test_the_tensors_begin_where_torch_would_put_them(tiny_model: TinyFactory) -> None:
    files = tiny_model("llama")
    assert weights_file.data_offset(files.weights) % folder.ALIGNMENT == 0
    with safe_open(files.weights, framework="pt") as weights:
        assert all(weights.get_tensor(name).data_ptr() % folder.ALIGNMENT == 0 for name in weights.keys())  # noqa: SIM118
