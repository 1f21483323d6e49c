"""An experiment on a tiny model, run for real: its blocks, when it ends, and that nothing is lost or kept twice."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from splitlearn import config
from splitlearn.arms.report import ArmReport, Item
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.errors import InputError, SetupError, TrunkRefused
from splitlearn.events import Recovery
from splitlearn.lab import experiment
from splitlearn.lab.analysis.findings import METRICS, findings_of
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.design import AA
from splitlearn.lab.experiment import Experiment, ExperimentProgress, exclusive
from splitlearn.lab.records import FIRST_PASS, Trial
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.lab.store import Store
from splitlearn.runtime.load import Reading, reading
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.trunk import settings

ASKED = ExperimentRequest("inference_mode", pairs=2, max_new_tokens=4, prompts=("The sky", "is blue"))


@pytest.fixture(scope="module")
def runs(tiny_model: TinyFactory) -> Iterator[Runs]:
    with Runs(config.parse(settings(tiny_model("llama"), runs={"threads": 1})), silent) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed here is of no interest."""
    monkeypatch.setattr(experiment, "PREFILLS", 2)


def _store(runs: Runs, folder: Path, asked: ExperimentRequest = ASKED) -> Store:
    return Store.create(folder / "experiment.sqlite", setup(runs, asked, "a command"))


@dataclass(frozen=True)
class Whole:
    """An experiment of three pairs from beginning to end: how far it said it was, its arms and its runs."""

    states: tuple[ExperimentProgress, ...]
    arms: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def measured(self) -> list[Trial]:
        """Those of the blocks."""
        return [trial for trial in self.trials if trial.block != FIRST_PASS]


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    asked = replace(ASKED, pairs=3)
    with pytest.MonkeyPatch.context() as patched, _store(runs, tmp_path_factory.mktemp("whole"), asked) as store:
        patched.setattr(experiment, "PREFILLS", 2)
        states = tuple(Experiment(runs, store).go())
        return Whole(states, tuple(arm.name for arm in store.setup.plan.arms), tuple(store.trials()))


def test_every_arm_runs_once_in_each_block_in_an_order_of_its_own(whole: Whole) -> None:
    orders = [[trial.arm for trial in whole.measured if trial.block == block] for block in range(3)]
    assert all(sorted(order) == sorted(whole.arms) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert {len(trial.token_ids) for trial in whole.measured} == {4}
    last = whole.states[-1]
    assert (last.phase, last.blocks, last.remaining_s) == ("finished", 3, 0)


def test_the_findings_answer_each_question_in_both_metrics(runs: Runs, tmp_path: Path) -> None:
    with _store(runs, tmp_path, replace(ASKED, flags="use_cache,inference_mode")) as store:
        list(Experiment(runs, store).go())
        found = findings_of(store)
    asked = {(row.question.flag, row.question.kind, row.metric) for row in found.rows if row.question.flag != AA}
    expected = itertools.product(("all flags", "use_cache", "inference_mode"), ("full", "split"), METRICS)
    assert asked == set(expected)
    assert found.finished == "2 pairs, as asked"
    assert all(row.effect is not None and row.effect.pairs == 2 for row in found.rows)
    numbers = found.evidence["use_cache, split"].numbers
    assert numbers["largest"] < 1e-3
    assert numbers["perplexity_ratio"] == pytest.approx(1, abs=1e-3)


def test_one_that_was_stopped_goes_on_and_loses_no_whole_block(runs: Runs, tmp_path: Path) -> None:
    stop = threading.Event()
    with _store(runs, tmp_path) as store:
        for state in Experiment(runs, store, stop).go():
            if state.blocks == 1 and state.phase.startswith("block 2, 3"):
                stop.set()
        before = store.trials()
        assert store.finished is None
    assert {trial.bad for trial in before if trial.block == 1} == {"interrupted"}
    with Store.open(tmp_path / "experiment.sqlite", write=True) as store:
        list(Experiment(runs, store).go())
        after = store.trials()
        assert store.finished == "2 pairs, as asked"
    assert after[: len(before)] == before
    good = Counter((trial.block, trial.arm) for trial in after if not trial.bad and trial.block != FIRST_PASS)
    assert set(good.values()) == {1}
    assert len(good) == 2 * len(store.setup.plan.arms)


def test_a_run_beside_other_programs_is_kept_with_their_load(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(before: Reading | None, also: Iterable[int]) -> Reading:
        return replace(reading(before, also), others_cpu=1.5, stolen_cpu=0.25)

    monkeypatch.setattr(experiment, "reading", read)
    with _store(runs, tmp_path) as store:
        list(Experiment(runs, store).go())
        trials = store.trials()
    assert {trial.others_cpu for trial in trials} == {1.75}
    assert {(t.block, t.attempt) for t in trials if not t.bad} == {(FIRST_PASS, 0), (0, 1), (1, 1)}


def test_ttft_is_the_median_of_several_prefills(whole: Whole) -> None:
    assert {len(trial.prefills_s) for trial in whole.measured} == {3}
    assert {len(trial.prefills_s) for trial in whole.trials if trial.block == FIRST_PASS} == {2}
    assert all(trial.ttft_s == median(trial.prefills_s) for trial in whole.trials)


def test_the_prefills_of_a_block_go_round_the_arms_to_and_fro(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, asked = runs.stream, list[tuple[Kind, object, int, int]]()

    def noted(kind: Kind, flags: object, request: Any, stop: object, copy: int) -> Iterator[Item]:
        asked.append((kind, flags, copy, request.max_new_tokens))
        return stream(kind, flags, request, stop, copy)  # type: ignore[arg-type]

    with _store(runs, tmp_path) as store:
        count = len(store.setup.plan.arms)
        for progress in Experiment(runs, store).go():
            if progress.phase.startswith("block 1: first tokens"):
                monkeypatch.setattr(runs, "stream", noted)
    block = asked[: 3 * count]
    one, other, last = (block[at : at + count] for at in (0, count, 2 * count))
    assert one == other[::-1]
    assert [each[:3] for each in one] == [each[:3] for each in last]
    assert {each[3] for each in one + other} == {1}
    assert {each[3] for each in last} == {4}


def test_the_first_pass_shows_the_baselines_and_no_flags_before_the_flags_and_the_check_last(
    runs: Runs, tmp_path: Path
) -> None:
    with _store(runs, tmp_path, replace(ASKED, flags="use_cache,inference_mode")) as store:
        for progress in Experiment(runs, store).go():
            if progress.phase.startswith("block 1"):
                break
        first = [trial.arm for trial in store.trials()]
    assert first == [
        f"{name}, {kind}"
        for name in ("baseline", "no flags", "without use_cache", "without inference_mode", "baseline again")
        for kind in ("full", "split")
    ]
    table = flags_table(progress.findings)
    assert all(cells.first_pass for row in (*table.rows, *table.controls) for cells in row.cells.values())
    (check,) = table.controls
    assert all(cells.tpot_ratio and cells.tpot_ratio.ratio for cells in check.cells.values())


def test_arms_of_decided_questions_drop_out_and_a_passed_check_runs_in_one_block_of_four(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up times: without the cache everything takes twice as long, inference_mode makes no difference in TPOT and
    cannot be decided in TTFT."""
    draw = random.Random(3)
    original = Trial.of

    def made_up(report: ArmReport, prefills_s: tuple[float, ...], arm: str, *rest: Any) -> Trial:
        factor = 2.0 if arm.startswith(("no flags", "without use_cache")) else 1.0
        ttft = factor * draw.lognormvariate(0, 0.3 if arm.startswith("without inference_mode") else 1e-4)
        tpot = factor * draw.lognormvariate(0, 1e-4)
        return replace(original(report, prefills_s, arm, *rest), ttft_s=ttft, prefills_s=(ttft,), tpot_s=tpot)

    monkeypatch.setattr(Trial, "of", made_up)
    monkeypatch.setattr(experiment, "PREFILLS", 0)
    asked = replace(ASKED, flags="full:use_cache,inference_mode client:none trunk:none", pairs=None, max_new_tokens=2)
    with Store.create(tmp_path / "x", replace(setup(runs, asked, "a command"), max_pairs=14)) as store:
        list(Experiment(runs, store).go())
        trials = [trial for trial in store.trials() if trial.block != FIRST_PASS]
        found = findings_of(store)
    count = Counter(trial.arm for trial in trials)
    assert count["baseline, full"] == count["without inference_mode, full"] == 14
    assert count["no flags, full"] == count["without use_cache, full"] == 9
    assert count["baseline again, full"] == 9 + 1
    verdicts = {(row.question.flag, row.metric): row.verdict for row in found.rows}
    assert verdicts["use_cache", "tpot_s"] == "faster"
    assert verdicts["inference_mode", "tpot_s"] == "no measurable effect"


def test_a_block_in_which_the_trunk_was_lost_is_run_again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, lost = runs.stream, iter([((3, Recovery(0.5, "a:1", "a:1", 12)),)])

    def recovered(*asked: object) -> Iterator[Item]:
        for item in stream(*asked):  # type: ignore[arg-type]
            measured = isinstance(item, ArmReport) and item.kind == "split" and len(item.metrics.token_ids) == 4
            if isinstance(item, ArmReport) and measured:
                item = replace(item, metrics=replace(item.metrics, recoveries=next(lost, ())))
            yield item

    monkeypatch.setattr(experiment, "FIRST_PASS_TOKENS", 2)
    monkeypatch.setattr(runs, "stream", recovered)
    with _store(runs, tmp_path) as store:
        states = list(Experiment(runs, store).go())
        trials = [trial for trial in store.trials() if trial.block != FIRST_PASS]
    assert any(state.discarded == "block 1 did not count and runs again: the trunk was lost" for state in states)
    assert {t.bad for t in trials if (t.block, t.attempt) == (0, 1)} == {"the trunk was lost"}
    assert {(t.block, t.attempt) for t in trials if not t.bad} == {(0, 2), (1, 1)}


def test_an_arm_that_cannot_be_run_is_left_out_and_says_why(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = runs.stream

    def refuse(kind: Kind, flags: object, *rest: object) -> Iterator[Item]:
        if kind == "split" and not flags.names():  # type: ignore[attr-defined]
            raise TrunkRefused("this trunk will not")
        return stream(kind, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "stream", refuse)
    with _store(runs, tmp_path) as store:
        list(Experiment(runs, store).go())
        rows = findings_of(store).rows
    said = {row.question.key: row.text for row in rows}
    assert said["inference_mode, split"] == "unavailable: this trunk will not"
    assert {row.effect.pairs for row in rows if row.effect} == {2}


def test_an_experiment_that_ended_or_is_of_another_model_is_not_gone_on_with(
    runs: Runs, tmp_path: Path, tiny_model: TinyFactory
) -> None:
    with _store(runs, tmp_path) as store:
        other = Runs(config.parse(settings(tiny_model("gpt2"))), silent)
        with pytest.raises(InputError, match=r"model\.name"):
            list(Experiment(other, store).go())
        store.finish("enough")
        with pytest.raises(InputError, match="has not finished"):
            list(Experiment(runs, store).go())


def test_two_experiments_at_once_are_refused(cache: Path) -> None:
    with exclusive(config.Config()), pytest.raises(SetupError, match="Another experiment"), exclusive(config.Config()):
        pass
    with exclusive(config.Config()):
        pass


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"pairs": 0}, "pairs"), ({"minutes": 0.0}, "minutes"), ({"delta": 5.0}, "delta"), ({"delta": 0.0}, "delta"),
        ({"max_new_tokens": 1}, "max_new_tokens"), ({"prompts": (" ",)}, "prompt"), ({"design": "other"}, "design"),
    ],
)  # fmt: skip
def test_an_experiment_that_cannot_be_is_refused_by_the_name_of_what_is_wrong(
    changed: dict[str, object], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        replace(ASKED, **changed)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_progress_tells_the_remaining_time_from_the_second_block_on(whole: Whole) -> None:
    early = [state for state in whole.states if state.phase.startswith(("first pass", "block 1"))]
    assert early and all(state.remaining_s is None for state in early)
    assert all(state.remaining_s for state in whole.states if state.phase.startswith("block 2"))
