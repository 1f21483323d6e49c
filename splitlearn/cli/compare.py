"""`splitlearn compare`: one prompt through both arms."""

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.breakdown import check_pairs
from splitlearn.cli import options
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import check
from splitlearn.runtime.command_line import Job, real, whole
from splitlearn.sampling import SamplingParams

if TYPE_CHECKING:
    from splitlearn.config import Config

Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="(default: generation.prompt)")]
Template = Annotated[
    str | None, typer.Option(metavar="NAME", help="apply the one with this name, of a model with several")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="end where this text comes up; may be repeated")]
Temperature = Annotated[float, typer.Option(metavar="T", parser=real("temperature"), help="0 is greedy")]
TopK = Annotated[int, typer.Option(metavar="K", parser=whole("top_k"), help="0 filters nothing")]
TopP = Annotated[float, typer.Option(metavar="P", parser=real("top_p"), help="1 filters nothing")]
Penalty = Annotated[float, typer.Option(metavar="R", parser=real("repetition_penalty"), help="1 is none")]
Seed = Annotated[int, typer.Option(metavar="S", parser=whole("seed"), help="of sampling")]
Samples = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=whole("samples"),
        help="answers at once, with seed S, S + 1, ...; they share each trip to the trunk",
    ),
]
Pairs = Annotated[
    int, typer.Option(metavar="N", parser=whole("pairs"), help="run each arm N times, in pairs; the ratio has a range")
]


def compare(
    prompt: Prompt = None,
    max_new_tokens: options.MaxNewTokens = None,
    flags: options.Flags = None,
    words: options.Words = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on to the limit, for measuring")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the model's chat template")] = False,
    chat_template: Template = None,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    samples: Samples = 1,
    pairs: Pairs = 1,
    trunk: options.Trunks = None,
    link: options.Link = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Run one prompt through the full and the split model."""
    settings = options.settings(config, trunk, link)
    if raw and chat_template is not None:
        raise InputError("chat_template", chat_template, "either --chat-template or --raw")
    defaults = settings.generation
    request = GenerationRequest(
        prompt=defaults.prompt if prompt is None else prompt,
        max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
        chat=False if raw else defaults.chat if chat_template is None else chat_template,
        ignore_eos=ignore_eos,
        stop=tuple(stop or ()),
        samples=samples,
        sampling=SamplingParams(temperature, top_k, top_p, repetition_penalty, seed),
    )
    chosen = options.chosen_flags(flags, words, settings)
    check(chosen)
    check_pairs(pairs)
    from splitlearn import config as configuration

    return partial(_run, configuration.with_chat(settings, request.chat), request, chosen, pairs, as_json)


def _run(config: "Config", request: GenerationRequest, flags: str, pairs: int, as_json: bool) -> None:
    from splitlearn.arms.compare import compare
    from splitlearn.arms.link_cost import link_cost
    from splitlearn.arms.runs import Runs
    from splitlearn.cli.tables import print_comparison, print_link, watch
    from splitlearn.planning.auto import settle
    from splitlearn.runtime.progress import on_console
    from splitlearn.runtime.terminal import say

    with on_console() as progress, Runs(config, progress, settle) as runs:
        chosen = runs.flags(flags)
        runs.check_trunk()
        show = watch(progress, request.samples * request.max_new_tokens)
        found = compare(runs, request, chosen, pairs, show)
        cost = link_cost(runs, request, chosen, found.split, show) if found is not None else None
    if found is None:  # nothing sets the cancellation here
        raise SplitlearnError("The comparison ended early.")
    if as_json:
        say(json.dumps({**found.as_json(), "link": cost and cost.as_json()}, indent=2))
        return
    print_comparison(found)
    if cost is not None:
        print_link(cost)
