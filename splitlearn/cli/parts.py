"""`splitlearn parts`: what the model is made of, what each part of a split holds, and what each cut of it costs."""

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.flags.selection import check
from splitlearn.runtime.command_line import Job, whole

if TYPE_CHECKING:
    from splitlearn.arms.runs import Runs
    from splitlearn.models.plan import SplitPlan
    from splitlearn.planning.anatomy import Anatomy
    from splitlearn.planning.report import CutReport
    from splitlearn.runtime.progress import Progress

CONTEXT_WITHOUT_LIMIT = 2048

Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=whole("context"),
        help="tokens for KV bytes and FLOPs (default: all that the model takes; with --cuts those of the measurement)",
    ),
]
Cuts = Annotated[bool, typer.Option("--cuts", help="measure a few short runs, and show what each cut costs")]
ClientMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="with --cuts: a client's, such as 600MB")]
Measure = Annotated[
    str | None, typer.Option(metavar="START:END[,...]", help="with --cuts: run these cuts, too, such as 4:26,8:20")
]


def parts(
    context: Context = None,
    cuts: Cuts = False,
    client_memory: ClientMemory = None,
    measure: Measure = None,
    link: options.Link = None,
    flags: options.Flags = None,
    words: options.Words = None,
    trunk: options.Trunks = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Show what the model is made of, what client and trunk hold, and what each cut of it costs."""
    configured = options.settings(config, trunk, link)
    if context is not None and context < 1:
        raise InputError("context", context, "at least 1 token")
    memory, ranges = _size(client_memory), _ranges(measure)
    chosen = options.chosen_flags(flags, words, configured)
    check(chosen)
    cuts = cuts or bool(client_memory or measure or link or flags)

    def run() -> None:
        from splitlearn.arms.runs import Runs
        from splitlearn.checkpoints import catalogue
        from splitlearn.models.plan import plan_of
        from splitlearn.planning import anatomy
        from splitlearn.planning.auto import without_figures
        from splitlearn.runtime.progress import on_console

        with on_console() as progress:
            settings = without_figures(configured, progress).config
            files = catalogue.prepare(settings.model, progress)
            plan = plan_of(settings, files.n_layers)
            model = anatomy.read(files, settings.model.dtype)
            report = None
            if cuts:
                _check(ranges, files.n_layers)
                with Runs(settings, progress) as runs:
                    report = _report(runs, model, chosen, context, memory, ranges, progress)
        _show(model, plan, context, report, as_json)

    return run


def _report(
    runs: "Runs",
    model: "Anatomy",
    flags: str,
    context: int | None,
    memory: float | None,
    ranges: list[tuple[int, int]],
    progress: "Progress",
) -> "CutReport":
    from splitlearn.models.plan import SplitPlan
    from splitlearn.planning.measure import measure_cut, measure_rates, short_request
    from splitlearn.planning.report import report_of

    runs.check_trunk()
    request, applied = short_request(runs.config.generation.prompt), runs.flags(flags)
    plans = [SplitPlan(start, end, model.n_layers) for start, end in ranges]
    for plan in plans:
        runs.check_cut(plan)
    rates = measure_rates(runs, model, applied, request, progress)
    found = [measure_cut(runs, plan, applied, request, runs.link, progress) for plan in plans]
    if rates is None:  # nothing sets the cancellation here
        raise SplitlearnError("The measurement ended early.")
    measured = [run for run in found if run is not None]
    return report_of(model, runs.plan, rates, runs.link, context, memory, measured)


def _show(model: "Anatomy", plan: "SplitPlan", context: int | None, report: "CutReport | None", as_json: bool) -> None:
    from splitlearn.cli.parts_tables import print_anatomy, print_cuts, print_parts
    from splitlearn.planning.anatomy import parts_of
    from splitlearn.runtime.terminal import say

    length = context or (report.context if report else model.context) or CONTEXT_WITHOUT_LIMIT
    found = parts_of(model, plan, length)
    if as_json:
        said = {"anatomy": asdict(model), "context": length, "parts": [asdict(part) for part in found]}
        say(json.dumps({**said, **({"cuts": report.as_json()} if report else {})}, indent=2))
        return
    print_anatomy(model)
    print_parts(found, length)
    if report is not None:
        print_cuts(report)


def _check(ranges: list[tuple[int, int]], n_layers: int) -> None:
    for start, end in ranges:
        if not start < end <= n_layers:
            raise InputError("measure", f"{start}:{end}", f"trunk layers within 0:{n_layers}, at least one")


def _size(text: str | None) -> float | None:
    """Bytes of a size such as 300MB."""
    from splitlearn.planning.devices import SIZE, size_of  # slow to import, and not needed for --help

    try:
        return None if text is None else size_of(text)
    except ValueError as error:
        raise InputError("client_memory", text, SIZE) from error


def _ranges(text: str | None) -> list[tuple[int, int]]:
    """Trunk ranges such as 4:26,8:20."""
    found = [re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", each, re.ASCII) for each in (text or "").split(",") if text]
    if not all(found):
        raise InputError("measure", text, "trunk layers such as 4:26,8:20")
    return [(int(each[1]), int(each[2])) for each in found if each]
