"""A configured model, from its name to a checked folder in the cache."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitlearn.checkpoints import catalogue, convert
from splitlearn.checkpoints.catalogue import CATALOGUE
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import ModelConfig
from splitlearn.errors import InputError, ModelError
from splitlearn.runtime import device
from splitlearn.runtime.progress import Step, silent
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support import prepare as command
from tests.support.forks import Fork, Main
from tests.support.tiny import make_checkpoint


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts without the process of its own, whose imports take seconds."""
    monkeypatch.setattr(convert, "convert_in_subprocess", convert.convert)


def forked(checkpoint: Path, log: Path, main: Main = command.main) -> Fork:
    """A process that prepares `checkpoint`, and writes what it says meanwhile to `log`."""
    return Fork(main, [str(checkpoint)], ROOT, log)


def prepare(name: str | Path) -> ModelFiles:
    return catalogue.prepare(ModelConfig(name=str(name)), silent)


def test_a_local_folder_is_converted_once(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    steps: list[Step] = []
    first = catalogue.prepare(ModelConfig(name=str(checkpoint)), steps.append)
    assert {"Reading the weights", "Writing the converted weights"} <= {step.label for step in steps}
    assert first.folder.parent == cache
    assert (first.n_layers, first.facts.context_length) == (6, 512)
    steps.clear()
    assert catalogue.prepare(ModelConfig(name=str(checkpoint)), steps.append) == first
    assert steps == []


def test_a_local_folder_that_changed_is_converted_again(tmp_path: Path, cache: Path, in_process: None) -> None:
    first = prepare(make_checkpoint(tmp_path / "checkpoint"))
    second = prepare(make_checkpoint(tmp_path / "checkpoint", n_layers=3))
    assert first.folder != second.folder
    assert second.n_layers == 3


def test_a_converted_folder_is_used_where_it_is(tiny_model: TinyFactory, cache: Path) -> None:
    folder = tiny_model().folder
    assert prepare(folder).folder == folder
    assert not cache.exists()


@pytest.mark.parametrize(
    "name", ["smolm2", "/nowhere", "a/b/c", "../x", "https://host/a", "a b/c", "gpt2/", "x" * 300, "~x/y"]
)
def test_a_name_of_no_known_form_is_refused(name: str, cache: Path) -> None:
    with pytest.raises(InputError, match="smollm2-135m-instruct, tinyllama-1.1b-chat, gpt2, a hub id"):
        prepare(name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written .* SPLITLEARN_CACHE or model\.cache"):
        prepare(make_checkpoint(tmp_path / "checkpoint"))


def test_two_processes_make_it_once(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    children = [forked(checkpoint, log, command.converting) for log in logs]
    answers = [child.stdout.read() for child in children]
    for child in children:
        child.close()
    assert answers[0] == answers[1] == f"{prepare(checkpoint).digest} {checkpoint}\n"
    said = [log.read_text() for log in logs]
    assert sum("Reading the weights" in text for text in said) == 1
    assert sum("Waiting for another process" in text for text in said) == 1


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, cache: Path, in_process: None
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    child = forked(checkpoint, tmp_path / "log")
    while not list(cache.glob("*.partial-*/converted")):
        assert child.poll() is None
        time.sleep(0.01)
    child.close()  # by SIGKILL
    assert catalogue.catalogue_status(ModelConfig())[len(CATALOGUE) :] == []
    assert prepare(checkpoint).n_layers == 6
    assert not list(cache.glob("*.partial-*"))


def test_the_catalogue_says_what_is_cached(tmp_path: Path, cache: Path, in_process: None) -> None:
    own = prepare(make_checkpoint(tmp_path / "checkpoint"))
    rows = catalogue.catalogue_status(ModelConfig())
    assert [row.name for row in rows] == [*(entry.name for entry in CATALOGUE), own.folder.name]
    assert [row.folder for row in rows] == [*[None] * len(CATALOGUE), own.folder]
    assert rows[-1].cached_bytes > own.weights.stat().st_size
    assert rows[-1].source == str(tmp_path / "checkpoint")
    (own.folder / "manifest.json").write_text("{")
    assert catalogue.catalogue_status(ModelConfig())[-1].source == "unknown (its manifest is damaged)"


def test_the_cache_folder_is_the_environments_then_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "environment"))
    config = ModelConfig(cache=tmp_path / "config")
    assert catalogue.cache_folder(config) == tmp_path / "environment" / "v1"
    monkeypatch.delenv("SPLITLEARN_CACHE")
    assert catalogue.cache_folder(config) == tmp_path / "config" / "v1"
    assert catalogue.cache_folder(ModelConfig()).parent.name == "splitlearn"


def test_a_device_that_is_not_here_is_refused() -> None:
    assert device.resolve("cpu") == torch.device("cpu")
    assert device.resolve("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match=r"model\.device"):
        device.resolve("cuda:99")


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
