"""The public API: its list, full and split through it, and the code of docs/library.md."""

import re
from pathlib import Path

import pytest

import splitlearn
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, TrunkRefused
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.forks import printed, run_programs
from tests.support.trunk import serve_here

PROMPT = "Why is the sky blue?"
PAGE = ROOT / "docs" / "library.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


def answer(stages: splitlearn.Stages) -> list[int]:
    events = splitlearn.generate(stages, PROMPT, max_new_tokens=8, ignore_eos=True)
    return [token for event in events if isinstance(event, splitlearn.TokenEvent) for token in event.token_ids]


def test_the_public_names_are_these() -> None:
    assert splitlearn.__all__ == [
        "Done",
        "JsonFormat",
        "SamplingParams",
        "SplitlearnError",
        "Stages",
        "TokenEvent",
        "compare",
        "generate",
        "load_full",
        "load_split",
    ]
    assert all(getattr(splitlearn, name).__doc__ for name in splitlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = splitlearn.load


def test_a_split_gives_the_tokens_of_the_full_model_with_a_local_and_with_a_remote_trunk(files: ModelFiles) -> None:
    name = str(files.folder)
    full = answer(splitlearn.load_full(name, flags="use_cache", threads=1))
    local = splitlearn.load_split(name, 2, 4, flags="use_cache", threads=1)
    assert len(full) == 8
    assert answer(local) == full
    with (
        serve_here(files, "trunk:use_cache") as here,
        splitlearn.load_split(name, 2, 4, trunk=here.address, flags="use_cache", threads=1) as remote,
    ):
        assert len(remote) == len(local)
        assert answer(remote) == full


def test_what_cannot_be_loaded_is_said_by_name(files: ModelFiles) -> None:
    name = str(files.folder)
    with pytest.raises(InputError, match=r"split\.start: 9"):
        splitlearn.load_split(name, 9, 12)
    with pytest.raises(InputError, match="flags: 'warp'"):
        splitlearn.load_full(name, flags="warp")
    with pytest.raises(InputError, match=r"model\.dtype: 'float8'"):
        splitlearn.load_full(name, dtype="float8")
    with serve_here(files) as here, pytest.raises(TrunkRefused, match=r"layers: it serves \[2, 4\)"):
        splitlearn.load_split(name, 1, 4, trunk=here.address)


@pytest.mark.weights
def test_the_page_of_the_library_runs_as_written(default_model: ModelFiles, tmp_path: Path) -> None:
    """In one process: to import torch takes most of a block's time."""
    paths = [tmp_path / f"block{at}.py" for at in range(len(BLOCKS))]
    for path, block in zip(paths, BLOCKS, strict=True):
        path.write_text(block, encoding="utf-8")
    said = printed(run_programs, [str(path) for path in paths], tmp_path, tmp_path / "errors")
    parts = re.split(r"^.*block\d+\.py$", said, flags=re.MULTILINE)[1:]
    assert len(parts) == len(BLOCKS) and all(part.strip() for part in parts), said
