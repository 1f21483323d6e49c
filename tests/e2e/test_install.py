"""`pip install .` gives a command that works in any folder, also in one that has modules of the same names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from splitlearn.checkpoints.folder import ModelFiles
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.children import output_of
from tests.support.trunk import settings

PACKAGES = ("splitlearn", "server", "ui")
DECOYS = ("server", "ui", "config", "splitlearn", "typer", "grpc")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of packages of a fresh environment with splitlearn installed; its dependencies are those of here."""
    folder = tmp_path_factory.mktemp("installed")
    source, venv = folder / "source", folder / "venv"
    for name in _tracked(*PACKAGES, "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    output_of([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet"]
    output_of([*pip, "--no-index", "--no-deps", "--no-build-isolation", str(source)], folder)
    yield packages


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A folder whose modules must not be imported, and whose config.yaml must not be read."""
    for name in DECOYS:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a decoy was imported')\n")
    (tmp_path / "config.yaml").write_text("somebody: else\n")
    return tmp_path


def _tracked(*paths: str) -> list[str]:
    return output_of(["git", "ls-files", *paths]).splitlines()


def splitlearn(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command in `folder`."""
    command = site.parents[2] / "bin" / "splitlearn"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(command), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_data_file_is_installed(site: Path) -> None:
    data = [name for name in _tracked(*PACKAGES) if not name.endswith(".py")]
    assert data and [name for name in data if not (site / name).exists()] == []


def test_the_command_says_its_version_and_the_models_in_any_folder(site: Path, decoy: Path) -> None:
    said = splitlearn(site, decoy, "--version")
    assert (said.returncode, said.stdout, said.stderr) == (0, "splitlearn 0.1.0\n", "")
    said = splitlearn(site, decoy, "models")
    assert said.returncode == 0 and "smollm2-135m-instruct" in said.stdout, said.stderr


@pytest.mark.parametrize(
    "line", ["compare --max-new-tokens few", "nonsense", "ui --port few", "serve-trunk --port few", "lab --pairs 0"]
)
def test_what_is_wrong_is_one_line_in_any_folder(site: Path, decoy: Path, line: str) -> None:
    said = splitlearn(site, decoy, *line.split())
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1), said.stderr
    assert said.stderr.startswith("error: ")


def test_a_comparison_runs_in_any_folder(
    site: Path, decoy: Path, tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files: ModelFiles = tiny_model("llama")
    config = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    config.write_text(yaml.safe_dump(settings(files)))
    said = splitlearn(site, decoy, "compare", "--max-new-tokens", "4", "--json", "--config", str(config))
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["identical_tokens"] is True
