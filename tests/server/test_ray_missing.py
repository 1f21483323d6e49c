"""Without Ray all else works, and what needs it says in one line what to install."""

from importlib import util
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main as server
from splitlearn.cli.main import main as command

FIND = util.find_spec


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *arguments: Any) -> Any:
        return None if name == "ray" else FIND(name, *arguments)

    monkeypatch.setattr("splitlearn.runtime.ray_installed.find_spec", find)


@pytest.mark.parametrize("arguments", [["--ray"], ["--ray", "10.0.0.1:6379"], ["--ray", "--port", "0"]])
def test_a_server_on_ray_says_what_to_install(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert server(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --ray: Ray is not installed") and "requirements-ray.txt" in line


def test_a_trunk_on_ray_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["compare", "--trunk", "ray"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trunk.address: Ray is not installed") and "requirements-ray.txt" in line
