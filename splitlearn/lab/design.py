"""The questions of an experiment, and the arms that answer them.

An `Arm` runs once in every block. A `Question` compares two arms of one block that differ in one flag: its ratio is
`treated` / `control`, with the flag applied in `treated`. Three designs:

* without: every flag but one; treated is the baseline with all flags, control is the baseline without the flag; and one
  question about all of them together, whose control has none;
* alone: each flag by itself; control is the baseline that keeps the KV cache and has no flag (for the cache itself:
  none at all), treated is the same with the flag; and one question about all of them together, whose treated has all;
* ladder: flags added one after another, in the order of the request; each step is compared with the one before.

The baseline runs a second time, in a worker of its own. This is the A/A question: its ratio should be 1, and its
interval is the noise floor. Flags that act only when sampling run under seeded sampling, with a baseline of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from splitlearn.errors import InputError
from splitlearn.events import KINDS, Kind
from splitlearn.flags.registry import FLAGS, Fidelity
from splitlearn.flags.selection import FlagSet
from splitlearn.sampling import SamplingParams

Design = Literal["without", "alone", "ladder"]
DESIGNS: tuple[Design, ...] = ("without", "alone", "ladder")
FIDELITIES: tuple[Fidelity, ...] = ("lossy", "rounding")
CACHE = "use_cache"
# For flags of the sampler, which do nothing in a greedy request.
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
BASELINE = "baseline"
AGAIN = "baseline again"
AA = "A/A"
ALL = "all flags"
NONE = "no flags"


@dataclass(frozen=True)
class Arm:
    """One way of running the prompt. `name` is unique in its experiment; `copy` counts workers with the same flags."""

    name: str
    kind: Kind
    flags: FlagSet
    sampled: bool = False
    copy: int = 0


@dataclass(frozen=True)
class Question:
    """What `flag` does in arms of `kind`: the names of the arm with it and of the arm without.

    The A/A question, which is about the method, has AA for its `flag`.
    """

    flag: str
    kind: Kind
    treated: str
    control: str

    @property
    def key(self) -> str:
        """The question's name in its experiment."""
        return f"{self.flag}, {self.kind}"


@dataclass(frozen=True)
class Plan:
    """The arms of an experiment and the questions they answer. A block has the arms of the questions still open."""

    design: Design
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def fidelity(self, question: Question) -> Fidelity:
        """The weakest fidelity among the flags in which the question's two arms differ."""
        one, other = self.arm(question.treated).flags, self.arm(question.control).flags
        differing = {flag.fidelity for name, flag in FLAGS.items() if one.only(name) != other.only(name)}
        return next((word for word in FIDELITIES if word in differing), "exact")


def plan(design: Design, flags: FlagSet, names: Sequence[str], together: bool = True) -> Plan:
    """The arms and questions about each flag in `names`, where `flags` are applied; and `together`, about all of them.

    Raises InputError if there is nothing to ask, and for a flag that is not applied on any side.
    """
    applied = flags.names()
    if not names and not (together and _has_together(design, flags)):
        raise InputError("flags", ", ".join(names), "at least one flag to ask about")
    for name in names:
        if name not in applied:
            raise InputError("flags", name, f"a flag that is applied: {', '.join(applied) or 'none is'}")
    arms: dict[str, Arm] = {}
    questions: list[Question] = []
    for kind in KINDS:
        pairs = list(_pairs(design, flags, names, kind, together))
        if {flag for flag, _, _ in pairs} <= ({AA, ALL} if names else {AA}):  # nothing to ask in this kind of arm
            continue
        for flag, treated, control in pairs:
            for arm in (treated, control):
                arms.setdefault(arm.name, arm)
            questions.append(Question(flag, kind, treated.name, control.name))
    return Plan(design, tuple(arms.values()), tuple(questions))


def first_pass(plan: Plan) -> list[Arm]:
    """The arms in the order in which a person wants to see them: baselines, no flags, then one flag after the other,
    each in full and in split. The second baselines of A/A come last: what differs there is chance."""

    def rank(arm: Arm) -> tuple[int, bool, bool, int]:
        asked = (q.flag for q in plan.questions if arm.name in (q.treated, q.control))
        about = next((flag for flag in asked if flag != AA), AA)
        order = list(dict.fromkeys(q.flag for q in plan.questions))
        base = arm.name == _arm(BASELINE, arm.kind, arm.flags).name
        return arm.copy, not base, not arm.name.startswith(NONE), order.index(about)

    return sorted(plan.arms, key=rank)


def _pairs(
    design: Design, flags: FlagSet, names: Sequence[str], kind: Kind, together: bool
) -> Iterator[tuple[str, Arm, Arm]]:
    """(flag, treated, control) for one kind of arm, A/A first."""
    base = {"without": flags, "alone": flags.only(CACHE), "ladder": flags.only()}[design]
    baseline = _arm(BASELINE, kind, base)
    yield AA, replace(baseline, name=f"{AGAIN}, {kind}", copy=1), baseline
    if design == "ladder":
        yield from _ladder(flags, names, kind)
        return
    if together and _has_together(design, flags) and _own(flags, kind) != _own(flags.only(), kind):
        none, every = _arm(NONE, kind, flags.only()), _arm(ALL, kind, flags)
        yield (ALL, baseline, none) if design == "without" else (ALL, every, baseline)
    for name in names:
        sampled = FLAGS[name].acts_when_sampling
        if not _acts(flags, name, kind):
            continue
        baseline = _arm(BASELINE, kind, base, sampled)
        if design == "without":
            yield name, baseline, _arm(f"without {name}", kind, flags.without(name), sampled)
        elif name == CACHE:
            yield name, baseline, _arm(NONE, kind, flags.only())
        else:
            yield name, _arm(f"{name} alone", kind, flags.only(name, CACHE), sampled), baseline


def _has_together(design: Design, flags: FlagSet) -> bool:
    """Whether there is a question about all flags together. The last step of a ladder has them all."""
    return design != "ladder" and len(flags.names()) > 1


def _ladder(flags: FlagSet, names: Sequence[str], kind: Kind) -> Iterator[tuple[str, Arm, Arm]]:
    below = _arm(BASELINE, kind, flags.only())
    for count, name in enumerate(names, start=1):
        if not _acts(flags, name, kind):
            continue
        step = _arm(f"{count}: with {name}", kind, flags.only(*names[:count]))
        yield name, step, below
        below = step


def _acts(flags: FlagSet, name: str, kind: Kind) -> bool:
    """Whether arms of this kind differ with and without the flag."""
    return _own(flags, kind) != _own(flags.without(name), kind)


def _own(flags: FlagSet, kind: Kind) -> tuple[frozenset[str], ...]:
    return (flags.full,) if kind == "full" else (flags.client, flags.trunk)


def _arm(name: str, kind: Kind, flags: FlagSet, sampled: bool = False) -> Arm:
    return Arm(f"{name}, {kind}{' (sampling)' if sampled else ''}", kind, flags, sampled)
