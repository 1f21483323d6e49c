"""Machine code is kept for later processes, never for other code than there is, and not needed."""

import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from splitlearn.kernels import jit
from tests.support.children import output_of
from tests.support.trunk import environment

CALLER = """
import numpy as np
from called import step
from splitlearn.kernels.jit import compiled

@compiled
def steps(x):
    for at in range(len(x)):
        x[at] = step(x[at])

x = np.ones(2)
steps(x)
print(x[1], sum(steps.stats.cache_hits.values()))
"""
CALLED = """
import numba

@numba.njit
def step(x):
    return x + {}
"""


def _run(folder: Path, adds: int) -> list[str]:
    (folder / "caller.py").write_text(CALLER)
    (folder / "called.py").write_text(CALLED.format(adds))
    return output_of([sys.executable, "caller.py"], folder, environment(PYTHONDONTWRITEBYTECODE="1")).split()


def test_what_is_kept_is_used_until_a_function_that_it_calls_changes_in_another_file(tmp_path: Path) -> None:
    assert _run(tmp_path, 3) == ["4.0", "0"]
    assert _run(tmp_path, 3) == ["4.0", "1"]
    assert _run(tmp_path, 5) == ["6.0", "0"]


def test_where_no_folder_can_keep_what_was_compiled_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nowhere = "numba.core.caching.IPythonCacheLocator"  # of what is typed in there only
    monkeypatch.setattr(jit, "LOCATORS", nowhere)

    def doubles(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        for at in range(len(x)):
            x[at] *= 2

    with monkeypatch.context() as inside, pytest.raises(RuntimeError, match="no locator"):
        inside.setattr(numba.config, "CACHE_LOCATOR_CLASSES", nowhere)
        numba.njit(cache=True)(doubles)
    x = np.ones(3)
    jit.compiled(doubles)(x)
    assert x.tolist() == [2, 2, 2]
