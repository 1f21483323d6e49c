"""`split: auto`: the cut is that of the server that runs, or the one that the figures of the machines speak for."""

from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.config import Config, Objective
from splitlearn.errors import InputError, TrunkError
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.auto import settle, smallest_among_best, without_figures
from splitlearn.planning.devices import DeviceEntry, device_of
from splitlearn.planning.network import Network, work_of
from splitlearn.runtime.progress import silent
from tests.planning.test_costs import MODEL, N
from tests.support.trunk import PLAN, TrunkHere, serve_here, settings
from ui.compare.view import split_facts
from ui.language.catalogue import chinese

LAPTOP: dict[str, Any] = {"base": "10MB", "weight_ratio": 1, "decode_ms": 4, "prefill_ms": 0.4, "step_ms": 6}
LAPTOP |= {"start_ms": 10, "memory": "1GB"}
DESK = {**LAPTOP, "decode_ms": 0.5}
NOBODY = "127.0.0.1:1"


def auto(files: ModelFiles, folder: Path | None = None, client: object = LAPTOP, **sections: Any) -> Config:
    """Settings with `split: auto`, and a file of two machines if there is a folder for it."""
    own = {**settings(files, **sections), "split": "auto", "flags": "none"}
    if folder is not None:
        (folder / "devices.yaml").write_text(
            yaml.safe_dump({"devices": {"laptop": client, "desk": DESK}}, sort_keys=False)
        )
        own["plan"] = {**own.get("plan", {}), "devices": str(folder / "devices.yaml")}
    return config.parse(own)


def test_the_range_of_a_server_that_runs_is_the_cut_and_what_it_costs_is_said(
    here: TrunkHere, files: ModelFiles, tmp_path: Path
) -> None:
    asked = auto(files, tmp_path, trunk={"address": f"{NOBODY},{here.address}"})
    found = settle(asked, silent)
    assert (found.config.cut.start, found.config.cut.end) == (PLAN.start, PLAN.end)
    assert found.config.trunk.address == (NOBODY, here.address)  # one that is away may come back
    for words in ("[2, 4) of 6", here.address, "laptop alone", "TPOT"):
        assert words in found.why
    assert without_figures(asked, silent).config == found.config


def test_of_two_ranges_that_run_the_better_one_is_taken_with_its_servers_alone(
    here: TrunkHere, files: ModelFiles, tmp_path: Path
) -> None:
    with serve_here(files, "trunk:none", {}, (0, 6)) as larger:
        addresses = f"{here.address},{larger.address}"
        found = settle(auto(files, tmp_path, trunk={"address": addresses}), silent)
    assert (found.config.cut.start, found.config.cut.end) == (0, 6)
    assert found.config.trunk.address == (larger.address,)


def test_a_client_without_figures_is_measured_and_runs_at_the_cut_that_was_planned(files: ModelFiles) -> None:
    """Both on this machine, by real runs: which cut is the best here is open, not that it is said and had."""
    with Runs(auto(files), silent, settle) as runs:
        runs.check_trunk()
        plan, said = runs.plan, runs.describe_trunk()
        assert SplitPlan(said.start, said.end, said.n_layers) == plan
        assert f"split: auto chose trunk layers [{plan.start}, {plan.end}) of 6" in runs.model.why
        assert any(words in runs.model.why for words in ("alone is better", "Splitting is better", "About the same"))
        assert runs.model.why in unescape(split_facts(runs.config, runs.model))
        runs.split_at(SplitPlan(1, 2, 6))
        assert runs.model.why == ""


def test_an_embedded_trunk_that_is_faster_gets_every_layer(files: ModelFiles, tmp_path: Path) -> None:
    found = settle(auto(files, tmp_path), silent)
    assert (found.config.cut.start, found.config.cut.end) == (0, 6)
    assert "Splitting is better" in found.why
    for why in (found.why, f"{found.why} Other programs used 1.4 cores meanwhile, so times may mislead."):
        said = chinese(why)
        assert said is not None and not {"split", "better", "programs"} & set(said.removeprefix("split: auto").split())


def test_a_slow_link_is_counted_and_one_machine_alone_is_said_to_be_better(files: ModelFiles, tmp_path: Path) -> None:
    found = settle(auto(files, tmp_path, trunk={"link": "rtt=300ms"}), silent)
    assert "One machine alone is better" in found.why


@pytest.mark.parametrize(
    ("objective", "decode_ms", "layers"), [("tpot", 4.1, N), ("tpot", 3.9, N), ("tpot", 400, 1), ("memory", 400, N)]
)
def test_of_cuts_that_predictions_cannot_tell_apart_the_smallest_client_is_taken(
    objective: Objective, decode_ms: float, layers: int
) -> None:
    entries = [DeviceEntry.model_validate({**LAPTOP, "step_ms": 0, "decode_ms": each}) for each in (4, decode_ms)]
    devices = tuple(device_of(name, entry) for name, entry in zip(("laptop", "desk"), entries, strict=True))
    route, equals = smallest_among_best(work_of(MODEL, 8, 64), Network(devices, {(0, 1): Link()}), objective)
    assert route is not None
    assert [span.end - span.start for span in route.spans] == [layers]
    assert equals == (objective == "tpot")


def test_what_cannot_be_planned_is_an_error_that_says_why(files: ModelFiles, tmp_path: Path) -> None:
    with pytest.raises(TrunkError, match="127.0.0.1:1"):
        settle(auto(files, tmp_path, trunk={"address": NOBODY}), silent)
    with pytest.raises(InputError, match=r"split: 'auto'.*no cut fits"):
        settle(auto(files, tmp_path, {**LAPTOP, "memory": "1MB"}), silent)
    three = {"devices": {"laptop": LAPTOP, "desk": DESK, "rack": DESK}}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(three))
    with pytest.raises(InputError, match=r"plan\.devices.*two machines"):
        settle(auto(files, plan={"devices": str(tmp_path / "three.yaml")}), silent)
    with pytest.raises(InputError, match=r"split: 'auto'.*start and end"):
        Runs(auto(files), silent).read_model()


def test_a_comparison_says_the_cut_and_why(
    here: TrunkHere, files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = auto(files, tmp_path, trunk={"address": here.address})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    assert command_line.main(["compare", "--config", str(tmp_path / "config.yaml"), "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "trunk layers [2, 4) of 6" in said.out
    (line,) = [line for line in said.err.splitlines() if "split: auto" in line]
    assert "laptop alone" in line
