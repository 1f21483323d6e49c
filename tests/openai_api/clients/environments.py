"""Clients that other people made, each installed from its registry into a folder of its own.

The folders are in the cache and are kept between runs, by the pins that they were made from. Where a registry cannot be
reached, the test is skipped with what its program said.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from platformdirs import user_cache_path

from tests.support import ROOT
from tests.support.children import output_of

HERE = Path(__file__).parent
END_S = 1500.0
"""Limits an installation, and a client's run: each is minutes on a busy machine."""


def python(name: str) -> Path:
    """The folder of programs of a virtual environment with what `name`/requirements.txt pins."""
    pins = HERE / name / "requirements.txt"
    folder = _folder(name, pins)
    with FileLock(f"{folder}.lock"):
        if not (folder / "installed").exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, symlinks=True)
            pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
            _install(name, [*pip, "install", "-q", "--retries", "2", "-r", str(pins)], folder)
    return folder / "bin"


def node(name: str) -> Path:
    """The folder of programs of an npm project with what `name`/package.json pins. The project's folder, two above, has
    the scripts of `name`, too, which find its modules there."""
    folder = _folder(name, HERE / name / "package.json")
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        for file in (HERE / name).iterdir():
            shutil.copy(file, folder)
        if not (folder / "installed").exists():
            npm = shutil.which("npm")
            if npm is None:
                pytest.skip("npm is not here")
            retry = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=2000"]
            _install(name, [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", *retry], folder)
    return folder / "node_modules" / ".bin"


def run(command: Sequence[str | Path], folder: Path = ROOT, **environment: str) -> str:
    """What a client's `command` prints."""
    return output_of(command, folder, {**os.environ, **environment}, END_S)


def _folder(name: str, pins: Path) -> Path:
    cache = user_cache_path("splitlearn") / "test-clients"
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"


def _install(name: str, command: Sequence[str | Path], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=END_S)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "npm error"))]
        pytest.skip(f"{name} cannot be installed here: {' '.join(lines[:4])}")
    (folder / "installed").touch()
