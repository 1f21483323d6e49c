"""`splitlearn attack`: what a trunk server can read of a text, by attacks that are run on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.privacy.victims import ANSWER_TOKENS
from splitlearn.runtime.command_line import Job, whole

if TYPE_CHECKING:
    from splitlearn.config import Config
    from splitlearn.models.plan import SplitPlan
    from splitlearn.privacy.summary import Line

Splits = Annotated[
    str | None,
    typer.Option("--splits", metavar="N[,...]", help="layers before the trunk, such as 1,2,4 (default: split.start)"),
]
Attacks = Annotated[str | None, typer.Option("--attacks", metavar="NAME[,...]", help="which (default: all)")]
Defences = Annotated[
    str,
    typer.Option("--defences", metavar="NAME[,...]", help="each alone, such as none,wire_dtype=int8 (default: none)"),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", parser=whole("limit"), help="of the prompts")]
AnswerTokens = Annotated[
    int, typer.Option("--answer-tokens", metavar="N", parser=whole("answer_tokens"), help="of each answer")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="results and a report of all that are there; they go on where they ended"
    ),
]


def attack(
    splits: Splits = None,
    attacks: Attacks = None,
    defences: Defences = "none",
    prompts: options.Prompts = None,
    limit: Limit = None,
    answer_tokens: AnswerTokens = ANSWER_TOKENS,
    seed: options.Seed = None,
    out: Out = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Attack prompts as a trunk server could, and show how much of them it reads."""
    from splitlearn.privacy.cut import cuts_of
    from splitlearn.privacy.defences import words
    from splitlearn.privacy.registry import ATTACKS

    asked = _Asked(
        options.settings(config),
        None if splits is None else cuts_of(splits),
        _names("attacks", attacks, list(ATTACKS)),
        _names("defences", defences, words()),
        limit,
        answer_tokens,
        seed or 0,
    )
    for field, value in (("limit", limit), ("answer_tokens", answer_tokens)):
        if value is not None and value < 1:
            raise InputError(field, value, "at least 1")
    own = None
    if prompts is not None:
        from splitlearn.lab.request import read_prompts

        own = read_prompts(prompts)
    return lambda: _run(asked, own, out, as_json)


@dataclass(frozen=True)
class _Asked:
    """What to do. `cuts` None is the configured one, `limit` None all prompts."""

    settings: "Config"
    cuts: Sequence[int] | None
    attacks: Sequence[str]
    defences: Sequence[str]
    limit: int | None
    answer_tokens: int
    seed: int


def _run(asked: _Asked, own: Sequence[str] | None, out: Path | None, as_json: bool) -> None:
    """Attack a person's `own` prompts, or the built-in ones, and show the results."""
    from splitlearn.checkpoints import catalogue
    from splitlearn.privacy import victims
    from splitlearn.privacy.results import Results
    from splitlearn.privacy.summary import summary
    from splitlearn.privacy.sweep import Sweep
    from splitlearn.runtime.progress import on_console
    from splitlearn.stages.loading import prepare_process

    every = victims.built_in() if own is None else victims.own(own)
    model, some = asked.settings.model, every[: asked.limit]
    with on_console() as progress:
        files = catalogue.prepare(model, progress)
        plans = _plans(asked.settings, files.n_layers, asked.cuts)
        prepare_process((), asked.settings.runs.threads)
        sweep = Sweep(files, model.dtype, plans, asked.attacks, asked.defences, some, asked.answer_tokens, asked.seed)
        header = sweep.header(every)
        with Results.open(out, header) as results:
            sweep.run(results, progress)
            lines = summary(results.rows)
    _end(header, lines, out, as_json)


def _end(header: dict[str, object], lines: "Sequence[Line]", out: Path | None, as_json: bool) -> None:
    from splitlearn.privacy import report
    from splitlearn.privacy.summary import HEADS
    from splitlearn.privacy.summary import as_json as in_json
    from splitlearn.runtime import hardware, programs
    from splitlearn.runtime.console import PlainTable, console
    from splitlearn.runtime.terminal import say

    machine = hardware.describe()
    if as_json:
        say(json.dumps(in_json(header, lines, machine), indent=2, ensure_ascii=False))
    else:
        table = PlainTable(*HEADS)
        for line in lines:
            table.add_row(*line.cells())
        console().print(table)
    if out is not None:
        say(f"Report: {report.write(out, header, lines, machine, programs.this_command())}", stderr=True)


def _plans(settings: "Config", n_layers: int, cuts: Sequence[int] | None) -> "list[SplitPlan]":
    """The plan of each cut, with the configured end. Raises InputError for a cut that the model does not have."""
    from splitlearn.config import AUTO, SplitConfig
    from splitlearn.models.plan import plan_of
    from splitlearn.privacy.cut import plan_at

    if settings.split == AUTO:
        settings = settings.model_copy(update={"split": SplitConfig()})
    usual = plan_of(settings, n_layers)
    return [plan_at(cut, usual) for cut in cuts or (usual.start,)]


def _names(field: str, text: str | None, known: list[str]) -> list[str]:
    """Names with commas between, each once and each `known`; None is all."""
    if text is None:
        return known
    names = list(dict.fromkeys(each.strip() for each in text.split(",")))
    for name in names:
        if name not in known:
            raise InputError(field, name, f"some of: {', '.join(known)}")
    return names
