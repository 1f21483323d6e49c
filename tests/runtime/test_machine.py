"""What is said of the machine and the software."""

import os
import shutil
from pathlib import Path

import psutil
import pytest

from splitlearn.runtime import environment, hardware
from tests.support.children import output_of


@pytest.fixture
def cpu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Linux would tell of the processor; empty."""
    monkeypatch.setattr(hardware, "CPU_FOLDER", tmp_path)
    return tmp_path


def test_the_commit_says_whether_there_are_changes(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    output_of([*git, "init", "--quiet"])
    (tmp_path / "file").write_text("one")
    output_of([*git, "add", "file"])
    output_of([*git, "commit", "--quiet", "-m", "one"])
    output_of([*git, "tag", "-a", "-m", "v1", "v1"])
    head = output_of([*git, "rev-parse", "HEAD"]).strip()
    assert hardware.commit(tmp_path) == head
    (tmp_path / "results").write_text("not tracked")
    assert hardware.commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert hardware.commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "installed").mkdir()
    assert hardware.commit(tmp_path / "installed") is None, "that is another project's commit"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.commit(hardware.CHECKOUT) is None


def test_the_wait_policy_is_the_one_that_workers_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = hardware.wait_policy()
    environment.set_defaults()
    assert before == hardware.wait_policy() == os.environ["OMP_WAIT_POLICY"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert hardware.wait_policy() == "ACTIVE"


def test_the_governors_and_throttle_counts_are_read_where_the_machine_tells(cpu_folder: Path) -> None:
    assert hardware.describe()["governor"] is None
    assert hardware.throttled() is None
    for core, governor in enumerate(("powersave", "performance", "powersave")):
        for name, text in (
            ("cpufreq/scaling_governor", governor),
            ("thermal_throttle/core_throttle_count", str(core)),
            ("thermal_throttle/package_throttle_count", "5"),
        ):
            path = cpu_folder / f"cpu{core}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    assert hardware.describe()["governor"] == "performance, powersave"
    assert hardware.throttled() == 0 + 1 + 2 + 3 * 5


@pytest.mark.parametrize("said", [None, OSError("no such file"), NotImplementedError()], ids=str)
def test_a_clock_that_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch, said: Exception | None) -> None:
    def cpu_freq() -> None:
        if said is not None:
            raise said

    monkeypatch.setattr(psutil, "cpu_freq", cpu_freq)
    assert hardware.clock_mhz("current") is None and hardware.describe()["cpu_max_mhz"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("model name\t: Some CPU\nflags\t\t: fpu sse2 avx2 avx512f avx512vl\n", "avx512"),
        ("flags\t\t: fpu sse2 avx avx2\n", "avx2"),
        ("flags\t\t: fpu sse2 avx\n", None),
        ("Features\t: fp asimd\n", None),
        ("", None),
    ],
)
def test_the_widest_vector_instructions_are_named(cpuinfo: str, found: str | None, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo, encoding="utf-8")
    assert hardware.vector_instructions(path) == found
    assert hardware.vector_instructions(tmp_path / "missing") is None
