"""What `splitlearn export` writes runs by ONNX Runtime alone, as its README says, and gives torch's tokens."""

import re
import sys
from pathlib import Path

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli.main import main
from splitlearn.stages.base import StageInput
from tests.conftest import TinyFactory
from tests.engines.onnx_chains import IDS, TORCH, chain
from tests.support.children import output_of
from tests.support.words import session_of

COUNT = 10
APART = "import sys; sys.modules.update(torch=None, transformers=None, splitlearn=None)\n"
"""In front of the README's program: it is to need none of these."""


@pytest.fixture(scope="module")
def small(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama", n_layers=2)


def torchs(files: ModelFiles, ids: list[int], count: int) -> list[int]:
    """The `count` tokens, greedy, that follow `ids`."""
    (stage,) = chain(files, None, TORCH)
    session, found = stage.open(session_of(TORCH), len(ids) + count), list[int]()
    position, new = 0, ids
    while len(found) < count:
        (output,) = stage.step([StageInput(session, position, torch.tensor([new]))])
        position, new = position + len(new), [int(output.x[0, -1].argmax())]
        found += new
    return found


def test_the_program_of_the_readme_gives_torchs_tokens(
    small: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ids = tmp_path / "exported", IDS[0, :9].tolist()
    assert main(["export", str(small.folder), "--onnx", str(out)]) == 0
    (program,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    (out / "run.py").write_text(APART + program)
    said = output_of([sys.executable, "run.py", str(COUNT), *map(str, ids)], out)
    assert list(map(int, said.split())) == torchs(small, ids, COUNT)
    capsys.readouterr()
    assert main(["export", str(small.folder), "--onnx", str(out)]) == 2
    assert "a folder that is not there yet" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial-*"))
