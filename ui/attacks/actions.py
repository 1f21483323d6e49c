"""The actions of the tab "What the server reads": attack a prompt, sweep over cuts. Nothing of Gradio here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from splitlearn.errors import InputError, SplitlearnError
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import parts_of
from splitlearn.planning.costs import tpot_s
from splitlearn.privacy import live
from splitlearn.privacy.cut import cuts_of, plan_at
from splitlearn.privacy.defences import NONE, words
from splitlearn.privacy.live import Item, Question
from splitlearn.privacy.scores import Hits
from splitlearn.privacy.summary import Line
from splitlearn.privacy.sweep_job import SweepJob
from splitlearn.reporting.files import csv
from ui import inputs
from ui.model.actions import Planner

DEFENCES = tuple(words())
CUTS = (1, 2, 4, 8, 16)
"""Of a sweep, as far as the model has them."""
PROMPTS = 8
FILE = "attacks.csv"
PUBLISHED = {("smollm2-135m-instruct", "float32", 2): (1.0, 200)}
"""By model, dtype and cut: the share of the prompts' tokens recovered, of so many prompts (docs/results/privacy.md)."""


@dataclass(frozen=True)
class Client:
    """A client of a cut. `tpot_s` is predicted from what was last measured of these machines, None before that."""

    n_layers: int
    weight_bytes: int
    tpot_s: float | None


class Attacks:
    """Attacks on the model of `planner`, whose queue they wait in; and `job`, the sweeps, which all visitors share."""

    def __init__(self, planner: Planner, job: SweepJob) -> None:
        self.planner, self.job = planner, job

    def attack(self, typed: Mapping[str, Any], visitor: str) -> Iterator[Item]:
        """Attack the typed prompt. Raises InputError, and SetupError while an experiment runs."""
        prompt, plan, (defence,) = str(typed["prompt"] or ""), self._plan(typed["splits"]), _known([typed["defence"]])
        if not prompt.strip():
            raise InputError("prompt", prompt, "some text")
        runs = self.planner.runs
        stop = yield from self.planner.ready(visitor)
        question = Question(runs.files, runs.dtype, plan, defence, prompt, runs.config.runs.threads, self.job.maps)
        with closing(live.read(question, stop)) as items:  # type: ignore[type-var]  # a generator
            yield from items

    def sweep(self, typed: Mapping[str, Any]) -> None:
        """Begin a sweep, or go on with one. Raises InputError, and SetupError while one runs."""
        usual = self.planner.runs.plan
        cuts = str(typed["cuts"] or "").strip()
        listed = cuts_of(cuts) if cuts else [cut for cut in CUTS if cut < usual.n_layers]
        plans = [plan_at(cut, usual) for cut in listed]
        self.job.start(plans, _known(typed["defences"] or ()), inputs.whole("limit", typed["limit"]))

    def known(self) -> tuple[float, int] | None:
        """The share of the prompts' tokens that the strongest attack recovered at the cut in use, without a defence,
        and of how many prompts: measured here, else PUBLISHED. None where that is not known."""
        runs, hits = self.planner.runs, dict[str, list[Hits]]()
        with suppress(SplitlearnError):  # results that cannot be read
            for row in self.job.rows():
                if (row.cut, row.defence) == (runs.plan.start, NONE) and row.prompt.tokens:
                    hits.setdefault(row.attack, []).append(row.prompt)
        shares = map(_pooled, hits.values())
        return max(shares, default=PUBLISHED.get((runs.files.name, runs.dtype, runs.plan.start)))

    def client(self, cut: int) -> Client:
        """A client with `cut` layers before the trunk. Raises what reading the model raises."""
        anatomy, plan = self.planner.anatomy(), plan_at(cut, self.planner.runs.plan)
        (part,) = (part for part in parts_of(anatomy, plan, 0) if part.name == "client")
        measured = self.planner.measured
        tpot = tpot_s(anatomy, measured.rates, Link(), plan.start, plan.end) if measured is not None else None
        return Client(part.n_layers, part.weight_bytes, tpot)

    def _plan(self, typed: object) -> SplitPlan:
        """The cut in use, or one behind as many layers as `typed`."""
        usual, text = self.planner.runs.plan, str(typed or "").strip()
        return plan_at(inputs.whole("splits", text) if text else usual.start, usual)


def _known(typed: object) -> list[str]:
    """Words for defences. Raises InputError."""
    chosen = [str(each) for each in (typed if isinstance(typed, list | tuple) else [typed])]
    for each in chosen:
        if each not in DEFENCES:
            raise InputError("defences", each, f"some of: {', '.join(DEFENCES)}")
    return chosen


def _pooled(hits: Sequence[Hits]) -> tuple[float, int]:
    """The share of all tokens, and how many prompts."""
    return sum(each.right for each in hits) / sum(each.tokens for each in hits), len(hits)


def recall(line: Line) -> float:
    """The share of prompt tokens recovered; 0 of an attack that does not look at them."""
    return line.prompt.value if line.prompt is not None else 0.0


def as_csv(lines: list[Line]) -> str:
    """The lines of sweeps; shares from 0 to 1, with their 95% intervals."""
    rows = [
        {
            "cut": line.cut or None,
            "defence": line.defence,
            "known": line.knows,
            "attack": line.attack,
            "prompts": line.prompts,
            **_share("prompt", line.prompt),
            **_share("answer", line.answer),
            "flips": line.flips and line.flips.value,
            "perplexity": line.perplexity,
            "bytes_per_token": line.token_bytes or None,
            "seconds_per_token": line.seconds_per_token if line.cut else None,
        }
        for line in lines
    ]
    return csv(pd.DataFrame(rows))


def _share(name: str, share: Any) -> dict[str, float | None]:
    return {
        f"{name}_recall{end}": None if share is None else getattr(share, field)
        for end, field in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
