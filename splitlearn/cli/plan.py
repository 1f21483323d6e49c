"""`splitlearn plan`: which layers on which machine, by dynamic programming from measured figures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.flags.selection import check
from splitlearn.runtime.command_line import Job, whole

if TYPE_CHECKING:
    from splitlearn.planning.choice import Choice

PROMPT_TOKENS = 128

Devices = Annotated[
    Path, typer.Option("--devices", metavar="FILE", help="machines and links (docs/planning.md), the client first")
]
Objective = Annotated[
    str, typer.Option("--objective", metavar="WORD", help="tpot, ttft, memory (of the client) or throughput")
]
PromptTokens = Annotated[int, typer.Option(metavar="N", parser=whole("prompt_tokens"), help="of the prompt, for TTFT")]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=whole("context"),
        help="tokens in a session's KV cache (default: the prompt's and generation.max_new_tokens)",
    ),
]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="measure what the file leaves out: this machine, running servers, links to them"),
]


def plan(
    devices: Devices,
    measure: Measure = False,
    objective: Objective = "tpot",
    prompt_tokens: PromptTokens = PROMPT_TOKENS,
    context: Context = None,
    flags: options.Flags = None,
    words: options.Words = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Plan which layers run on which machine: the least TPOT, TTFT or client memory, or the most throughput."""
    from splitlearn.planning.search import OBJECTIVES

    settings = options.settings(config)
    chosen = options.chosen_flags(flags, words, settings)
    check(chosen)
    if flags and not measure:
        raise InputError("flags", flags, "--measure beside it: given figures are those of some flags already")
    wanted = next((each for each in OBJECTIVES if each == objective), None)
    if wanted is None:
        raise InputError("objective", objective, f"one of: {', '.join(OBJECTIVES)}")
    tokens = context or prompt_tokens + settings.generation.max_new_tokens
    for field, value in (("prompt_tokens", prompt_tokens), ("context", tokens)):
        if value < 1:
            raise InputError(field, value, "at least 1 token")

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.planning import anatomy
        from splitlearn.planning import devices as file
        from splitlearn.planning.choice import choose
        from splitlearn.planning.network import work_of
        from splitlearn.runtime.progress import on_console

        listed, row_bytes = file.load(devices), None
        if not measure:
            file.network_of(listed)
        with on_console() as progress:
            model = anatomy.read(catalogue.prepare(settings.model, progress), settings.model.dtype)
            if measure:
                from splitlearn.planning.machines import measured

                listed, row_bytes = measured(listed, settings, chosen, model, prompt_tokens, progress)
        work = work_of(model, prompt_tokens, tokens, row_bytes)
        _show(choose(work, file.network_of(listed), wanted), model.model, tokens, as_json)

    return run


def _show(choice: "Choice", model: str, context: int, as_json: bool) -> None:
    from splitlearn.cli.plan_tables import print_choice
    from splitlearn.runtime.terminal import say

    if as_json:
        say(json.dumps({"model": model, "context": context, **choice.as_json()}, indent=2))
        return
    say(
        f"{model}: {choice.work.n_layers} layers, a prompt of {choice.work.prompt_tokens:,} tokens, context {context:,}"
    )
    print_choice(choice)
