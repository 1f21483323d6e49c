"""What is said of an experiment before it begins."""

from pathlib import Path

import pytest

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.lab import preflight
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.trunk import settings


def test_before_the_start_it_says_which_flags_how_many_arms_and_processes_and_how_busy_the_machine_is(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "SAMPLE_S", 0.01)
    with Runs(config.parse(settings(tiny_model("llama"), runs={"threads": 1})), silent) as runs:
        asked = ExperimentRequest("use_cache,low_cpu_mem_usage", max_new_tokens=4)
        found = preflight.preflight(runs, setup(runs, asked, "a command"))
    assert set(found.flags) == {"use_cache", "low_cpu_mem_usage"}
    assert found.arms == 10
    # For each kind: with low_cpu_mem_usage, without it, and the baseline again. use_cache needs no process of its own.
    assert found.processes == 6
    assert 0 < found.first_pass_s < found.first_verdicts_s
    text = " ".join(found.lines())
    assert "Measures 2 flags: use_cache, low_cpu_mem_usage." in text
    assert "10 arms in 6 processes" in text
    assert "cores now" in text
