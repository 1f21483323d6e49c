"""A converted folder against its manifest."""

import json
import os
from pathlib import Path

import pytest

from splitlearn.checkpoints.folder import open_folder, seal, sha256
from splitlearn.errors import WeightsDamaged
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.tiny import make_converted


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


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path: Path, tiny_model: TinyFactory) -> None:
    files = tiny_model()
    assert make_converted(tmp_path / "elsewhere").digest == files.digest
    assert make_converted(tmp_path / "other", n_layers=5).digest != files.digest
    assert tiny_model("qwen2").digest != files.digest


def test_the_digest_changes_with_the_config(copy: Path, tiny_model: TinyFactory) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    seal(copy, "test", tiny_model().facts, silent)
    assert open_folder(copy, "copy").digest != tiny_model().digest


def test_a_touched_file_is_hashed_once_more_and_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = sha256

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr("splitlearn.checkpoints.folder.sha256", noted)
    open_folder(copy, "copy")
    assert hashed == []
    (copy / "model.safetensors").touch()
    open_folder(copy, "copy")
    open_folder(copy, "copy")
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
        open_folder(copy, "copy")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_manifest_is_named(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(WeightsDamaged, match=r"manifest\.json cannot be read"):
        open_folder(copy, "copy")
