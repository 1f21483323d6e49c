"""Without a home folder, a user name, or a cache that can be written, the program works, and says what is lost."""

import errno
import os
import pickle
import pwd
import shutil
from getpass import getuser
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from splitlearn.checkpoints import catalogue
from splitlearn.config import Config, ModelConfig
from splitlearn.errors import ModelError
from splitlearn.kernels import jit
from splitlearn.lab.experiment import exclusive
from splitlearn.runtime import home


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is not in the system's list, in an environment that says nothing of them."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "SPLITLEARN_CACHE"):
        monkeypatch.setenv(name, "")  # so that the fixture puts back what was there
        monkeypatch.delenv(name)


@pytest.mark.parametrize("before", [None, "", "relative", "/nonexistent"])
@pytest.mark.usefixtures("nobody")
def test_a_user_without_home_and_name_gets_both_for_this_process_and_is_told(
    before: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is not None:
        monkeypatch.setenv("HOME", before)
    home.settle()
    assert getuser() == f"uid{os.getuid()}"
    assert Path.home().is_dir() and Path("~/x").expanduser() == Path.home() / "x"
    assert catalogue.cache_folder(ModelConfig()).is_relative_to(Path.home())
    (line,) = capsys.readouterr().err.splitlines()
    assert str(Path.home()) in line and "SPLITLEARN_CACHE" in line
    home.settle()
    assert capsys.readouterr().err == ""
    shutil.rmtree(Path.home())


def test_a_home_that_there_is_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home.settle()
    assert os.environ["HOME"] == str(tmp_path)
    monkeypatch.delenv("HOME")
    home.settle()
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space for it"), PermissionError(13, "not to be kept")])
def test_machine_code_that_cannot_be_kept_is_compiled_all_the_same_and_that_is_said_once(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from numba.core import caching

    def full(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    monkeypatch.setattr(jit, "LOCATORS", f"{jit.__name__}.InTree")
    for adds in (1, 2):
        steps, address = _kernels(adds)
        x = np.zeros(2)
        steps(x)
        assert x.tolist() == [adds, adds] and address
    (record,) = caplog.records
    assert str(error.strerror) in record.getMessage() and "NUMBA_CACHE_DIR" in record.getMessage()


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), EOFError("cut off"), pickle.UnpicklingError("nonsense")]
)
def test_machine_code_that_cannot_be_read_is_compiled(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    def unreadable(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(caching.IndexDataCacheFile, "load", unreadable)
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", unreadable)
    monkeypatch.setattr(jit, "LOCATORS", f"{jit.__name__}.InTree")
    steps, address = _kernels(1)
    x = np.zeros(1)
    steps(x)
    assert x.tolist() == [1] and address


def _kernels(adds: int) -> tuple[Any, int]:
    """One of each kind: called from Python, and called by its address."""

    @jit.compiled
    def steps(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        for at in range(len(x)):
            x[at] += adds

    @jit.called("float64(float64)")
    def step(x: float) -> float:
        return x + adds

    return steps, step.address


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(errno.ENOSPC, "No space left")])
def test_converted_weights_that_cannot_be_kept_are_one_line_that_names_the_setting(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitlearn.runtime.progress import silent

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "cache"))
    model = ModelConfig(name=str(tmp_path / "model"))
    for name in ("tempfile.TemporaryDirectory", "splitlearn.checkpoints.download.fetch"):
        with monkeypatch.context() as here:
            here.setattr(name, refuse)
            with pytest.raises(ModelError, match=f"{error.strerror}.*SPLITLEARN_CACHE"):
                catalogue.prepare(model, silent)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ModelError, match="SPLITLEARN_CACHE"):
        catalogue.catalogue_status(model)


def test_an_experiment_needs_no_cache_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with exclusive(Config(model=ModelConfig(cache=tmp_path / "file"))):
        pass
