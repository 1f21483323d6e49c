"""`splitlearn loadtest`: many clients of one trunk at once."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.runtime.command_line import Job, real, whole

if TYPE_CHECKING:
    from splitlearn.config import Config
    from splitlearn.loadtest.plan import LoadTest

Clients = Annotated[
    int | None, typer.Option(metavar="N", parser=whole("clients"), help="requests at once (default: 8)")
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="R", parser=real("rate"), help="open-loop: Poisson arrivals per second (default: closed-loop)"
    ),
]
Duration = Annotated[float | None, typer.Option(metavar="S", parser=real("duration"), help="in seconds (default: 30)")]
Replay = Annotated[bool, typer.Option("--replay", help="clients without layers, which send recorded hidden states")]
Ttft = Annotated[
    float | None, typer.Option(metavar="S", parser=real("ttft"), help="service level in seconds (default: 2)")
]
Tpot = Annotated[
    float | None, typer.Option(metavar="S", parser=real("tpot"), help="service level in seconds (default: 0.2)")
]


def loadtest(
    clients: Clients = None,
    rate: Rate = None,
    duration: Duration = None,
    replay: Replay = False,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    trunk: options.Trunks = None,
    out: options.Out = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Load a trunk server with many clients at once."""
    settings = options.settings(config, trunk)
    from splitlearn.lab.request import read_prompts
    from splitlearn.loadtest.plan import PROMPTS, Levels, LoadTest

    chosen = options.given(clients=clients, rate=rate, duration_s=duration, max_new_tokens=max_new_tokens, seed=seed)
    levels = Levels(**options.given(ttft_s=ttft, tpot_s=tpot))
    asked = LoadTest(read_prompts(prompts or PROMPTS), replay=replay, levels=levels, **chosen)
    return partial(_run, settings, asked, out, as_json)


def _run(settings: "Config", asked: "LoadTest", out: Path | None, as_json: bool) -> None:
    from splitlearn.cli import loadtest_run  # after what may be refused at once

    loadtest_run.run(asked, settings, out, as_json=as_json)
