"""The flags table: what each flag brings, full beside split, at any moment of an experiment.

    table = flags_table(findings)            # findings_of(store), also while the experiment runs
    table.as_json(); table.as_csv()

Every figure is the store's: medians over the runs that count, or those of the first pass until there is a whole block.
A row compares its arm with its `reference`, the arm that differs from it in this flag alone:

| design | row | reference |
| --- | --- | --- |
| without | all flags but this one | all flags |
| alone | this flag and the KV cache (`use_cache`: the cache alone) | the KV cache alone (`use_cache`: no flags) |
| ladder | the flags up to this one | the flags before it |

Ratios, memory and breakdown are row against reference: a TPOT ratio of 1.8 in the row "without use_cache" says that
leaving the cache out takes 1.8 times as long. The `verdict` is about the flag: then it is "faster".
"""

import csv
import io
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any, Literal

from splitlearn.events import Kind
from splitlearn.flags.registry import SIDES
from splitlearn.lab.analysis.findings import METRICS, Findings, Metric, Row
from splitlearn.lab.analysis.pairing import breakdown_per_token, whole_blocks
from splitlearn.lab.design import AA, ALL, BASELINE, NONE, Arm, Design, Plan, Question
from splitlearn.lab.records import FIRST_PASS, Setup, Trial
from splitlearn.lab.request import TOGETHER
from splitlearn.lab.stats import Effect
from splitlearn.runtime import programs

Role = Literal["all", "none", "flag", "control"]
PAIRS = 6
"""Of the command that repeats a row: enough for an interval."""
WIDEST = 100
"""An interval whose ends differ by a larger factor says nothing: that of two pairs may have 50 digits."""


@dataclass(frozen=True)
class Ratio:
    """The row's time / the reference's time, over `pairs` pairs.

    `low` and `high` are the interval at the rate `level`: None for a single pair and in the first pass, whose pair is
    not counted (`pairs` is 0). `verdict` is about the flag, or says why there is none yet; `decided` whether it stands.
    """

    ratio: float | None
    low: float | None
    high: float | None
    level: float | None
    pairs: int
    verdict: str
    decided: bool

    @property
    def interval(self) -> tuple[float, float] | None:
        """`low` and `high`, if they say something to a reader."""
        if self.low is None or self.high is None or self.high > WIDEST * self.low:
            return None
        return self.low, self.high


@dataclass(frozen=True)
class ArmCells:
    """One row's figures for full or for split: seconds, bytes, tokens per second.

    `n` runs are behind the medians; `first_pass` says that it is the one of the first pass. `tps` is of the request,
    `decode_tps` after the first token. `peak_bytes` is client and trunk together, `added_bytes` without what the
    imports take, `memory_change_bytes` the peak's change against the reference. `breakdown_us` has microseconds per
    token after the first by part, `breakdown_change_us` how much more than in the reference. `others_cpu` is how many
    cores other programs took meanwhile (mean). `unavailable` is why the arm cannot be run, or "".
    """

    arm: str
    reference: str | None
    n: int = 0
    first_pass: bool = False
    ttft_s: float | None = None
    tpot_s: float | None = None
    tps: float | None = None
    decode_tps: float | None = None
    load_s: float | None = None
    compile_s: float | None = None
    peak_bytes: float | None = None
    added_bytes: float | None = None
    memory_change_bytes: float | None = None
    ttft_ratio: Ratio | None = None
    tpot_ratio: Ratio | None = None
    breakdown_us: Mapping[str, float] | None = None
    breakdown_change_us: Mapping[str, float] | None = None
    others_cpu: float | None = None
    unavailable: str = ""


@dataclass(frozen=True)
class FlagRow:
    """One row: `name` for people, `flag` of the registry ("" for all, none and controls), its figures by kind of arm,
    and the command that measures its arms and their references again, in pairs. A kind is missing where the flag does
    not act."""

    name: str
    flag: str
    role: Role
    cells: Mapping[Kind, ArmCells]
    command: str


@dataclass(frozen=True)
class FlagsTable:
    """The rows in order: all flags, none, then the flags. `controls` are the A/A check (baseline against itself) and
    the baselines of flags that act when sampling."""

    model: str
    design: Design
    blocks: int
    finished: str | None
    rows: tuple[FlagRow, ...]
    controls: tuple[FlagRow, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)

    def as_csv(self) -> str:
        """One line for each row and kind of arm; mappings are spread over columns."""
        lines = [_flat(row, kind, cells) for row in (*self.rows, *self.controls) for kind, cells in row.cells.items()]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()


def flags_table(findings: Findings) -> FlagsTable:
    """The table of an experiment so far."""
    setup, plan = findings.setup, findings.setup.plan
    rows: dict[tuple[str, Role], FlagRow] = {}
    for place in _places(plan):
        cells = _cells(findings, place)
        row = rows.get((place.name, place.role))
        if row is None:
            about = place.question.flag if place.question and place.role == "flag" else ""
            row = FlagRow(place.name, about, place.role, {}, _command(setup, place))
        rows[place.name, place.role] = replace(row, cells={**row.cells, place.kind: cells})
    order: dict[Role, int] = {"all": 0, "none": 1, "flag": 2, "control": 3}
    listed = sorted(rows.values(), key=lambda row: order[row.role])
    return FlagsTable(
        model=setup.model,
        design=setup.design,
        blocks=findings.blocks,
        finished=findings.finished,
        rows=tuple(row for row in listed if row.role != "control"),
        controls=tuple(row for row in listed if row.role == "control"),
    )


@dataclass(frozen=True)
class _Place:
    """Where an arm stands: its row, and the question that compares it with its reference, if any."""

    name: str
    role: Role
    kind: Kind
    arm: str
    question: Question | None

    @property
    def reference(self) -> str | None:
        if self.question is None:
            return None
        return self.question.control if self.question.treated == self.arm else self.question.treated


def _places(plan: Plan) -> list[_Place]:
    """Each arm's place, in the order of the plan; questions first, then the arms that are only references."""
    found: list[_Place] = []
    for question in plan.questions:
        role: Role = "flag"
        arm = question.control if plan.design == "without" else question.treated
        if question.flag == AA:
            role, arm = "control", question.treated
        elif question.flag == ALL:
            role = "none" if plan.design == "without" else "all"
        found.append(_Place(_name(question.flag, plan.design, role), role, question.kind, arm, question))
    placed = {place.arm for place in found}
    return found + [_bare(plan.design, arm) for arm in plan.arms if arm.name not in placed]


def _bare(design: Design, arm: Arm) -> _Place:
    if arm.sampled:
        return _Place(f"{BASELINE}, sampling", "control", arm.kind, arm.name, None)
    if arm.name.startswith(BASELINE) and design == "without":
        return _Place(ALL, "all", arm.kind, arm.name, None)
    return _Place(NONE, "none", arm.kind, arm.name, None)


def _name(flag: str, design: Design, role: Role) -> str:
    if role != "flag":
        return {"none": NONE, "all": ALL, "control": AA}[role]
    return {"without": f"without {flag}", "alone": f"{flag} alone", "ladder": f"with {flag}"}[design]


def _cells(findings: Findings, place: _Place) -> ArmCells:
    failed: Mapping[str, str] = findings.notes.get("failed", {})
    empty = ArmCells(place.arm, place.reference, unavailable=failed.get(place.arm, ""))
    runs, first = _runs(findings, place.arm)
    if not runs:
        return empty
    tpot = [run.tpot_s for run in runs if run.tpot_s]
    filled = replace(
        empty,
        n=len(runs),
        first_pass=first,
        ttft_s=median(run.ttft_s for run in runs),
        tpot_s=median(tpot) if tpot else None,
        tps=median(_tps(run) for run in runs),
        decode_tps=1 / median(tpot) if tpot else None,
        load_s=median(run.load_s for run in runs),
        compile_s=median(run.compile_s for run in runs),
        peak_bytes=median(run.peak_bytes for run in runs),
        added_bytes=median(run.added_bytes for run in runs),
        breakdown_us=_microseconds(breakdown_per_token(runs)),
        others_cpu=fmean(run.others_cpu for run in runs),
    )
    return filled if place.question is None else _against(findings, place.question, filled)


def _against(findings: Findings, question: Question, cells: ArmCells) -> ArmCells:
    """`cells` with what compares them with their reference."""
    with_flag = question.treated == cells.arm
    runs = _compared(findings, question)
    own, other = runs if with_flag else (runs[1], runs[0])
    if not own or not other:
        return cells
    mine, theirs = _microseconds(breakdown_per_token(own)), _microseconds(breakdown_per_token(other))
    ratios = {metric: _ratio(findings, question, metric, (own, other), with_flag) for metric in METRICS}
    return replace(
        cells,
        memory_change_bytes=median(run.peak_bytes for run in own) - median(run.peak_bytes for run in other),
        ttft_ratio=ratios["ttft_s"],
        tpot_ratio=ratios["tpot_s"],
        breakdown_change_us={part: mine.get(part, 0.0) - theirs.get(part, 0.0) for part in {**theirs, **mine}},
    )


def _ratio(
    findings: Findings, question: Question, metric: Metric, runs: tuple[list[Trial], list[Trial]], with_flag: bool
) -> Ratio:
    row = next(row for row in findings.rows if row.question == question and row.metric == metric)
    if row.effect is not None:
        return _with_interval(row, row.effect, with_flag)
    one, other = (getattr(each[0], metric) for each in runs)
    counted = 0 if runs[0][0].block == FIRST_PASS else 1
    return Ratio(one / other if one and other else None, None, None, None, counted, row.text, row.decided)


def _with_interval(row: Row, effect: Effect, with_flag: bool) -> Ratio:
    ratio, low, high = effect.ratio, effect.low, effect.high
    if not with_flag:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    return Ratio(ratio, low, high, effect.level, effect.pairs, row.text, row.decided)


def _compared(findings: Findings, question: Question) -> tuple[list[Trial], list[Trial]]:
    """The runs with the flag and those without it, of the pairs that count; of the first pass until there are any."""
    found = findings.evidence.get(question.key)
    pairs = [pair for pair in found.pairs if not pair.unequal] if found else []
    if pairs:
        return [pair.treated for pair in pairs], [pair.control for pair in pairs]
    return _first(findings, question.treated), _first(findings, question.control)


def _runs(findings: Findings, arm: str) -> tuple[list[Trial], bool]:
    """The arm's runs of whole blocks, or that of the first pass, and which of the two it is."""
    blocks, _ = whole_blocks(findings.trials)
    counted = [block[arm] for _, block in blocks if arm in block]
    return (counted, False) if counted else (_first(findings, arm), True)


def _first(findings: Findings, arm: str) -> list[Trial]:
    return [t for t in findings.trials if t.block == FIRST_PASS and t.arm == arm and not t.bad]


def _tps(run: Trial) -> float:
    tokens = len(run.token_ids)
    return tokens / (run.ttft_s + (tokens - 1) * (run.tpot_s or 0.0))


def _microseconds(parts: Mapping[str, float]) -> dict[str, float]:
    return {part: seconds * 1e6 for part, seconds in parts.items()}


def _command(setup: Setup, place: _Place) -> str:
    """The command that measures the arm again, in PAIRS pairs with the one that it is held against: its table has
    both."""
    words = " ".join(f"{side}:{','.join(sorted(setup.flags.of(side))) or 'none'}" for side in SIDES)
    command = [programs.spoken(), "-m", "splitlearn", "lab", "--flags", words]
    command += ["--about", ",".join(_about(setup.plan, place)), "--design", setup.design]
    command += ["--pairs", str(PAIRS), "--max-new-tokens", str(setup.max_new_tokens)]
    return shlex.join([*command, *_options(setup.command)])


def _about(plan: Plan, place: _Place) -> list[str]:
    """What to ask so that the arm runs. A step of a ladder stands on those before it."""
    question = place.question
    if question is None or question.flag == AA:
        others, shown = [each for each in plan.questions if each.flag != AA], {place.arm, place.reference}
        question = next((each for each in others if {each.treated, each.control} & shown), others[0])
    if plan.design != "ladder":
        return [TOGETHER if question.flag == ALL else question.flag]
    asked = list(dict.fromkeys(each.flag for each in plan.questions if each.flag != AA))
    return asked[: asked.index(question.flag) + 1]


def _options(command: str) -> list[str]:
    """The options of the experiment's command that say where it ran, and on which prompts."""
    words = shlex.split(command)
    taken = ("--config", "--trunk", "--prompts")
    return [part for at, word in enumerate(words) if word in taken for part in words[at : at + 2]]


def _flat(row: FlagRow, kind: Kind, cells: ArmCells) -> dict[str, Any]:
    found: dict[str, Any] = {"row": row.name, "flag": row.flag, "kind": kind}
    for name, value in asdict(cells).items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{part}": inner for part, inner in value.items()}
        elif name not in ("ttft_ratio", "tpot_ratio", "breakdown_us", "breakdown_change_us"):
            found[name] = value
    return {**found, "command": row.command}
