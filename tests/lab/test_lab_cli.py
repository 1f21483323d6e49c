"""The commands `lab` and `report`; a kill in the middle loses nothing."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.lab.records import FIRST_PASS
from splitlearn.lab.store import Store
from tests.conftest import TinyFactory
from tests.e2e.test_cli import Refusal, configured, refusal
from tests.support.forks import Fork, printed
from tests.support.lab_trials import quick_command
from tests.support.trunk import Trunk, eventually, serve, settings

__all__ = ["refusal"]

LAB = ("lab", "--config", "config.yaml", "--flags", "inference_mode", "--pairs", "2", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trunk(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    with serve(settings(files), tmp_path_factory.mktemp("trunk")) as running:
        yield running


@pytest.fixture
def folder(files: ModelFiles, trunk: Trunk, tmp_path: Path) -> Path:
    """A folder with a config.yaml for a trunk that runs."""
    return configured(tmp_path, settings(files, trunk={"address": trunk.address}))


@contextmanager
def begun(folder: Path, *arguments: str) -> Iterator[Fork]:
    """The command in `folder`; killed at the end."""
    process = Fork(quick_command, arguments, folder, folder / "errors")
    try:
        yield process
    finally:
        process.close()


def test_lab_measures_and_report_shows_it_again(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*arguments: str) -> str:
        """What it prints, in this process."""
        capsys.readouterr()
        assert command_line.main(("report", *arguments)) == 0
        return capsys.readouterr().out

    folder = configured(tmp_path, settings(files))  # with an embedded trunk
    command = [*LAB, "--out", "found", "--json"]
    found = json.loads(printed(quick_command, command, folder, tmp_path / "errors"))
    assert found["finished"] == "2 pairs, as asked"
    frame = pd.read_csv(folder / "found" / "verdicts.csv")
    assert set(frame["flag"]) == {"A/A", "inference_mode"}
    assert "python -m splitlearn lab" in (folder / "found" / "report.html").read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    assert "inference_mode" in report("found")
    for tps, meets in (("0.001", True), ("1e9", False)):
        held = json.loads(report("found", "--json", "--ttft", "1000", "--tps", tps))
        assert held["service_level"] == {"ttft_s": 1000.0, "decode_tps": float(tps)}
        assert {arm["meets_decode_tps"] for arm in held["arms"]} == {meets}
    assert "inference_mode" in report("found", "found")


def test_a_killed_experiment_goes_on_without_losing_or_repeating_a_run(folder: Path) -> None:
    file = folder / "found" / "experiment.sqlite"
    with begun(folder, *LAB, "--pairs", "4", "--out", "found"):
        assert eventually(lambda: file.exists() and _count(file) >= 14, within_s=120)
    before = _stored(file)
    with begun(folder, "lab", "--resume", "found", "--config", "config.yaml") as other:
        assert other.wait(200) == 0, (folder / "errors").read_text()
    after = _stored(file)
    assert [key for key in after if key in before] == before
    with Store.open(file) as store:
        good = Counter(
            (trial.block, trial.arm) for trial in store.trials() if not trial.bad and trial.block != FIRST_PASS
        )
        assert set(good.values()) == {1}
        assert len(good) == 4 * len(store.setup.plan.arms)
        assert store.finished == "4 pairs, as asked"


def _count(file: Path) -> int:
    return len(_stored(file))


def _stored(file: Path) -> list[tuple[int, int, str, float]]:
    with Store.open(file) as store:
        return [(trial.block, trial.attempt, trial.arm, trial.ttft_s) for trial in store.trials()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lab", "--pairs", "0"), "pairs: 0 cannot be used"),
        (("lab", "--flags", "use_cache,inference_mode", "--about", "cache"), "about: 'cache' cannot be used"),
        (("lab", "--flags", "inference_mode", "--about", "all"), "about: 'all' cannot be used"),
        (("lab", "--pairs", "x"), "pairs: 'x'"),
        (("lab", "--delta", "3"), "delta: 3.0 cannot be used"),
        (("lab", "--minutes", "0"), "minutes: 0.0 cannot be used"),
        (("lab", "--pairs", "3", "--minutes", "4"), "either --minutes or --pairs"),
        (("lab", "--design", "sideways"), "design: 'sideways' cannot be used"),
        (("lab", "--flags", "warp_drive"), "flags: 'warp_drive' cannot be used"),
        (("lab", "--flags", "cache=static,cache=dynamic"), "exclude each other"),
        (("lab", "--flags", "none"), "at least one flag"),
        (("lab", "--prompts", "empty.txt"), "empty.txt"),
        (("lab", "--prompts", "missing.txt"), "missing.txt"),
        (("lab", "--resume", "nowhere"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("report", "nowhere", "--ttft", "0"), "ttft: 0.0 cannot be used"),
        (("report", "nowhere", "--tps", "nan"), "tps: nan cannot be used"),
        (("report", "a", "b", "c"), "experiments: 3 cannot be used"),
        (("report", "a", "b", "--tps", "5"), "experiments: 2 cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_2(
    folder: Path, refusal: Refusal, arguments: tuple[str, ...], said: str
) -> None:
    (folder / "empty.txt").write_text("\n \n")
    assert said in refusal.of(folder, *arguments)


def test_a_folder_that_holds_an_experiment_is_not_written_over(folder: Path, refusal: Refusal) -> None:
    (folder / "found").mkdir()
    (folder / "found" / "experiment.sqlite").write_text("something")
    assert "--resume" in refusal.of(folder, *LAB, "--out", "found")
    assert (folder / "found" / "experiment.sqlite").read_text() == "something"


def test_a_second_experiment_is_refused_while_one_runs(folder: Path, refusal: Refusal) -> None:
    file = folder / "first" / "experiment.sqlite"
    with begun(folder, *LAB, "--pairs", "50", "--out", "first") as first:
        assert eventually(lambda: file.exists() and _count(file) > 0, within_s=120)
        refused = refusal.of(folder, *LAB, "--out", "second")
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 0, "Ctrl-C ends the run that is under way, and says how to go on"
    assert "Another experiment is running" in refused
