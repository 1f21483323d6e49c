"""`splitlearn lab`: an experiment on what flags do."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime.command_line import Job, real, whole

Design = Annotated[str, typer.Option(metavar="NAME", help="without (all flags but one), alone or ladder")]
About = Annotated[
    str | None,
    typer.Option(metavar="FLAG[,...]", help="ask only about these of the flags; all: about all of them together"),
]
Pairs = Annotated[
    int | None, typer.Option(metavar="N", parser=whole("pairs"), help="exactly so many pairs, one look at the end")
]
Minutes = Annotated[
    float | None,
    typer.Option(metavar="M", parser=real("minutes"), help="end after so long, decided or not (default: 60)"),
]
Delta = Annotated[
    float | None,
    typer.Option(metavar="D", parser=real("delta"), help="a ratio this near to 1 counts as no effect (default: 0.02)"),
]
Resume = Annotated[Path | None, typer.Option(metavar="DIR", help="go on with the experiment in that folder")]


def lab(
    flags: options.Flags = None,
    words: options.Words = None,
    about: About = None,
    design: Design = "without",
    pairs: Pairs = None,
    minutes: Minutes = None,
    delta: Delta = None,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = None,
    trunk: options.Trunks = None,
    out: options.Out = None,
    resume: Resume = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Measure what each flag does, with verdicts."""
    settings = options.settings(config, trunk)
    if pairs is not None and minutes is not None:
        raise InputError("minutes", minutes, "either --minutes or --pairs")
    if resume is not None:
        from splitlearn.cli import lab_run

        return partial(lab_run.resume, resume, settings, as_json=as_json)
    from splitlearn.lab.request import ExperimentRequest, read_prompts

    chosen = options.given(pairs=pairs, minutes=minutes, delta=delta, max_new_tokens=max_new_tokens, seed=seed)
    if prompts is not None:
        chosen["prompts"] = read_prompts(prompts)
    if about is not None:
        chosen["about"] = tuple(map(str.strip, about.split(",")))
    asked = ExperimentRequest(options.chosen_flags(flags, words, settings), design=design, **chosen)  # type: ignore[arg-type]
    from splitlearn.cli import lab_run  # after what may be refused at once

    return partial(lab_run.run, asked, settings, out, as_json=as_json)
