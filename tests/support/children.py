"""Child processes that a test runs to their end."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import ROOT

# Limits a child that hangs: pytest's own timeout would not end it.
END_S = 280.0


def output_of(
    command: Sequence[str | Path],
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    end_s: float = END_S,
) -> str:
    """Run `command` in `folder` and return its stdout. Fails with all its output unless it ends with status 0."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=end_s)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
