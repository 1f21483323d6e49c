"""The per-flag table: which rows there are, that they run in both arms, and that they read back as CSV."""

import io
import threading
from collections.abc import Iterator
from itertools import islice

import pandas as pd
import pytest

from splitlearn.config import Config, ModelConfig, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.lab.table import SAMPLED, measure, rows
from splitlearn.progress import silent
from splitlearn.runs import Runs
from splitlearn.selection import FlagSet
from tests.conftest import TinyFactory

BOTH = frozenset({"use_cache", "inference_mode"})
REQUEST = GenerationRequest("The sky is blue", max_new_tokens=6)


@pytest.fixture(scope="module")
def runs(tiny_model: TinyFactory) -> Iterator[Runs]:
    config = Config(model=ModelConfig(name=str(tiny_model("llama").folder)), runs=RunsConfig(threads=1, warm_workers=2))
    with Runs(config, silent) as opened:
        yield opened


def test_a_row_stands_for_each_flag_left_out_or_alone() -> None:
    flags = FlagSet(full=BOTH, client=BOTH, trunk=BOTH)
    listed = rows(flags, ["without", "alone"])
    assert [(row.kind, row.flag) for row in listed] == [
        ("none", None),
        ("all", None),
        ("without", "inference_mode"),
        ("alone", "inference_mode"),
        ("without", "use_cache"),
        ("alone", "use_cache"),
    ]
    assert listed[2].flags.full == {"use_cache"}
    assert listed[3].flags.full == BOTH, "alone keeps the KV cache, unless it is the one asked about"
    assert listed[5].flags.full == {"use_cache"}


def test_sampler_flags_are_held_against_rows_under_the_same_sampling() -> None:
    applied = BOTH | {"fast_top_k"}
    listed = rows(FlagSet(full=applied, client=applied, trunk=BOTH), ["without"])
    sampled = [row for row in listed if row.sampled]
    assert [(row.kind, row.flag) for row in sampled] == [("none", None), ("all", None), ("without", "fast_top_k")]
    assert all(row.request(REQUEST).sampling == SAMPLED for row in sampled)
    assert all(row.request(REQUEST).sampling.greedy for row in listed if not row.sampled)


def test_every_row_is_measured_in_both_arms_and_reads_back_as_csv(runs: Runs) -> None:
    listed = rows(FlagSet(full=BOTH, client=BOTH, trunk=BOTH), ["without"])
    snapshots = list(measure(runs, REQUEST, listed, repeats=2))
    assert [shot.done for shot in snapshots] == list(range(2 * 2 * len(listed) + 1))
    frame = pd.read_csv(io.StringIO(snapshots[-1].frame.to_csv(index=False)))
    assert list(frame["row"]) == [row.label for row in listed]
    assert (frame["repeats"] == 2).all()
    assert frame["identical_tokens"].all()
    figures = [
        column
        for column in map(str, frame)
        if column.endswith(("_ttft_s", "_tpot_s", "_tps", "_load_s", "_added_bytes"))
    ]
    assert len(figures) == 10
    assert (frame[figures] > 0).all().all()


def test_a_cancelled_table_ends_with_what_it_has(runs: Runs) -> None:
    stop = threading.Event()
    listed = rows(FlagSet(full=BOTH, client=BOTH, trunk=BOTH), ["without"])
    snapshots = measure(runs, REQUEST, listed, repeats=50, cancelled=stop)
    seen = list(islice(snapshots, 2))
    stop.set()
    assert list(snapshots) == []
    assert seen[-1].done == 1
