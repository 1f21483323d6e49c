"""An exported graph is used where it is whole and of the same model, layers and versions; any other is made anew."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from splitlearn.checkpoints.folder import ModelFacts, ModelFiles
from splitlearn.engines.onnx_files import MOST_BYTES, Origin, kept
from tests.support.forks import Fork

FACTS = ModelFacts("llama", 6, 48, 400, 512, {})
ORIGIN = Origin("digest", 2, 4, False, False, ("torch 1", "onnx 2"))
GRAPH = b"graph" * 100


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    """A model whose folder nobody reads here."""
    return ModelFiles("model", "nowhere", tmp_path / "model", "digest", FACTS)


@pytest.fixture
def folder(files: ModelFiles) -> Path:
    """Where its graphs are, one among them."""
    assert kept(files, ORIGIN, lambda: GRAPH) == GRAPH
    return files.folder.with_name("model.onnx")


def never() -> bytes:
    """What makes a graph that is there already."""
    raise AssertionError("it is made again")


def test_a_graph_is_made_once(files: ModelFiles, folder: Path) -> None:
    assert kept(files, ORIGIN, never) == GRAPH
    assert (folder / "2-4.onnx").read_bytes() == GRAPH


def _flip(folder: Path) -> None:
    (folder / "2-4.onnx").write_bytes(b"x" + GRAPH[1:])


def _halve(folder: Path) -> None:
    (folder / "2-4.onnx").write_bytes(GRAPH[:250])


def _grow(folder: Path) -> None:
    os.truncate(folder / "2-4.onnx", MOST_BYTES + 1)


def _nest(folder: Path) -> None:
    (folder / "2-4.json").write_text("[" * 100_000)


def _take_anothers(folder: Path) -> None:
    """The files of other layers under this one's name."""
    other = replace(ORIGIN, start=1)
    there = folder.with_name("model")
    kept(ModelFiles("", "", there, "digest", FACTS), other, lambda: b"other")
    for suffix in (".onnx", ".json"):
        shutil.copy(folder / f"1-4{suffix}", folder / f"2-4{suffix}")


def _age(folder: Path) -> None:
    """As by an earlier version of a package."""
    described = json.loads((folder / "2-4.json").read_text())
    (folder / "2-4.json").write_text(json.dumps({**described, "versions": ["torch 0", "onnx 2"]}))


def _leave_half(folder: Path) -> None:
    """As a kill between the two files leaves it."""
    (folder / "2-4.json").unlink()


@pytest.mark.parametrize("harm", [_flip, _halve, _grow, _nest, _take_anothers, _age, _leave_half])
def test_a_damaged_foreign_or_stale_graph_is_made_anew(
    files: ModelFiles, folder: Path, harm: Callable[[Path], None]
) -> None:
    harm(folder)
    assert kept(files, ORIGIN, lambda: b"new") == b"new"
    assert kept(files, ORIGIN, never) == b"new"


def test_another_models_graph_in_the_same_folder_is_not_used(files: ModelFiles, folder: Path) -> None:
    assert kept(files, replace(ORIGIN, digest="another"), lambda: b"new") == b"new"


def killed_in_mid_write(arguments: list[str]) -> int:
    """A process that keeps the graph of the model in the folder arguments[0], and is killed while it writes."""
    folder = Path(arguments[0])

    def killed() -> bytes:
        (folder.with_name("model.onnx") / ".2-4.onnxabc").write_bytes(GRAPH[:10])  # as a write under way has it
        os.kill(os.getpid(), signal.SIGKILL)
        return GRAPH

    kept(ModelFiles("model", "nowhere", folder, "digest", FACTS), ORIGIN, killed)
    return 0


def test_a_kill_while_a_graph_is_written_leaves_nothing_that_is_used(files: ModelFiles) -> None:
    writer = Fork(killed_in_mid_write, [str(files.folder)], files.folder.parent, None)
    assert writer.wait() == -signal.SIGKILL
    writer.close()
    assert kept(files, ORIGIN, lambda: GRAPH) == GRAPH
    there = files.folder.with_name("model.onnx").iterdir()
    assert sorted(path.name for path in there if path.suffix != ".lock") == ["2-4.json", "2-4.onnx"]


@contextmanager
def disk_with(size: int) -> Iterator[None]:
    """Inside, no file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_graph_is_used_all_the_same(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    with disk_with(100):
        assert kept(files, ORIGIN, lambda: GRAPH) == GRAPH
    (said,) = (record.getMessage() for record in caplog.records)
    assert "2-4" in said and "cannot be kept" in said and "\n" not in said
    assert not list(files.folder.parent.rglob("*.onnx*2-4*")) and kept(files, ORIGIN, lambda: b"new") == b"new"


def test_a_folder_that_cannot_be_made_is_one_line(files: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    files.folder.with_name("model.onnx").write_text("a file")
    assert kept(files, ORIGIN, lambda: GRAPH) == GRAPH
    assert len(caplog.records) == 1
