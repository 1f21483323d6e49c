"""No code of a model's own is run, whatever its folder asks for and whoever would answer yes."""

import ast
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlearn.arms.draft_model import check_vocabulary
from splitlearn.checkpoints import convert
from splitlearn.checkpoints.folder import ModelFiles, open_folder, read_config, seal
from splitlearn.errors import ModelError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.planning import anatomy
from splitlearn.runtime.progress import silent
from tests.support.tiny import make_checkpoint, make_converted

ROOT = Path(__file__).parents[2]
FILES = [path for part in ("splitlearn", "server", "ui", "bench") for path in (ROOT / part).rglob("*.py")]
OF_TRANSFORMERS = {"from_pretrained", "from_config"}
# peft has no such option.
WITHOUT = {"splitlearn/checkpoints/adapter.py"}


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OF_TRANSFORMERS:
            yield node


def _says_no(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    value = given.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def test_every_call_of_transformers_says_that_no_code_is_trusted() -> None:
    calls = [
        (f"{path.relative_to(ROOT)}:{call.lineno}", _says_no(call))
        for path in FILES
        for call in _calls(ast.parse(path.read_text(encoding="utf-8")))
        if path.relative_to(ROOT).as_posix() not in WITHOUT
    ]
    assert len(calls) > 6
    assert [where for where, says_no in calls if not says_no] == []


def test_every_child_process_is_given_its_stdin() -> None:
    starts = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("subprocess.Popen", "subprocess.run")
    ]
    assert len(starts) > 3
    assert [where for where, given in starts if not given & {"stdin", "input"}] == []


def _make_evil(folder: Path, proof: Path) -> None:
    """Have the tokenizer, the config and the model of `folder` ask for code that leaves a file behind."""
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    code = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    for name, more in (("tokenizer_config.json", {"tokenizer_class": "Evil"}), ("config.json", {})):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **more, "auto_map": code}))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who says yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))


@pytest.fixture
def converted(tmp_path: Path, yes: None) -> ModelFiles:
    """A converted folder, sealed with such code in it."""
    files = make_converted(tmp_path / "converted", n_layers=3)
    _make_evil(files.folder, tmp_path / "proof")
    seal(files.folder, files.source, files.facts, silent)
    return open_folder(files.folder, "evil")


def test_a_converted_folder_runs_no_code(converted: ModelFiles, tmp_path: Path) -> None:
    for read in (lambda: Tokens.load(converted.folder, use_fast=True), lambda: check_vocabulary(converted, converted)):
        with pytest.raises(
            ModelError, match=r"needs Python code of its own \(auto_map\), and no code of a model is run"
        ):
            read()
    assert not hasattr(read_config(converted.folder), "auto_map")
    assert anatomy.read(converted, "float32").n_layers == 3
    assert not (tmp_path / "proof").exists()


def test_a_conversion_runs_no_code_and_reads_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", n_layers=2)
    _make_evil(checkpoint, tmp_path / "proof")
    # whatever is printed into the pipe is no answer of the child's either
    (tmp_path / "sitecustomize.py").write_text("print('Do you wish to run the custom code? [y/N]', end=' ')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer, end = os.pipe()
    os.write(end, b"y\n" * 99)
    os.close(end)
    before = os.dup(0)
    os.dup2(answer, 0)
    try:
        with pytest.raises(ModelError, match=r"needs Python code of its own \(auto_map\)"):
            convert.convert_in_subprocess(checkpoint, tmp_path, None, silent)
        assert len(os.read(0, 1000)) == 198  # nobody read of it
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(answer)
    assert not (tmp_path / "proof").exists()


def test_a_model_of_a_known_kind_is_converted_without_the_code_it_names(tmp_path: Path, yes: None) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", n_layers=2)
    plain = json.loads((checkpoint / "tokenizer_config.json").read_text())
    _make_evil(checkpoint, tmp_path / "proof")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(plain))
    target = tmp_path / "converted"
    target.mkdir()
    assert convert.convert(checkpoint, target, None, silent).n_layers == 2
    assert not list(target.glob("*.py"))
    assert not (tmp_path / "proof").exists()
