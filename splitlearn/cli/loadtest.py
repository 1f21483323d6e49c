"""`splitlearn loadtest`: many clients at once of a trunk server, or of any server of the OpenAI protocol."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime.command_line import Job, real, whole

if TYPE_CHECKING:
    from splitlearn.config import Config
    from splitlearn.loadtest.endpoint import Endpoint
    from splitlearn.loadtest.plan import LoadTest

SHORTEST_TRACE_S = 1.0
"""Rates are per second of the load, which is therefore no shorter."""
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
PromptWords = Annotated[
    str | None, typer.Option(metavar="LENGTHS", help="made-up prompts: 128, 64-256, normal:M:SD, lognormal:M:SIGMA")
]
AnswerTokens = Annotated[
    str | None, typer.Option(metavar="LENGTHS", help="of answers (default: 1/4 of --max-new-tokens to all of it)")
]
PrefixWords = Annotated[
    int | None, typer.Option(metavar="N", parser=whole("prefix_words"), help="words that all prompts begin with")
]
Turns = Annotated[
    int | None, typer.Option(metavar="N", parser=whole("turns"), help="requests of a conversation (default: 1)")
]
Trace = Annotated[
    Path | None, typer.Option(metavar="FILE", help="replay a trace: a JSON object a line (docs/loadtest.md)")
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="load a server of the OpenAI protocol, not a trunk: http://.../v1"),
]
Model = Annotated[str | None, typer.Option(metavar="ID", help="with --url: the model (default: the only one listed)")]
Completions = Annotated[bool, typer.Option("--completions", help="with --url: text completions, not chat")]
KeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="with --url: the environment variable that has the API key")
]


def loadtest(
    clients: Clients = None,
    rate: Rate = None,
    duration: Duration = None,
    replay: Replay = False,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = None,
    prompt_words: PromptWords = None,
    answer_tokens: AnswerTokens = None,
    prefix_words: PrefixWords = None,
    turns: Turns = None,
    trace: Trace = None,
    seed: options.Seed = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    trunk: options.Trunks = None,
    url: Url = None,
    model: Model = None,
    completions: Completions = False,
    key_env: KeyEnv = None,
    out: options.Out = None,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> Job:
    """Load a trunk server, or any server of the OpenAI protocol, with many clients at once."""
    from splitlearn.lab.request import read_prompts
    from splitlearn.loadtest.plan import PROMPTS, Levels, LoadTest

    chosen = options.given(clients=clients, rate=rate, duration_s=duration, max_new_tokens=max_new_tokens, seed=seed)
    made_up = options.given(prompt_words=prompt_words, answers=answer_tokens, trace=trace)
    if prompt_words or trace:
        _refuse("without --prompt-words and --trace", prompts=prompts)
    if answer_tokens:
        _refuse("without --answer-tokens", max_new_tokens=max_new_tokens)
    if completions:
        _refuse("without --completions, in a chat", turns=turns)
    workload = {**_workload(**made_up), **options.given(prefix_words=prefix_words, turns=turns), **chosen}
    levels = Levels(**options.given(ttft_s=ttft, tpot_s=tpot))
    asked = LoadTest(read_prompts(prompts or PROMPTS), replay=replay, levels=levels, **workload)
    if url is None:
        _refuse("for --url", model=model, completions=completions, key_env=key_env)
        return partial(_load_trunk, options.settings(config, trunk), asked, out, as_json)
    _refuse("for a trunk", replay=replay, trunk=trunk, config=config)
    from splitlearn.loadtest.endpoint import Endpoint, key_of

    key = None if key_env is None else key_of(key_env)
    return partial(_load_endpoint, Endpoint(url, model or "", not completions, key), asked, out, as_json)


def _workload(trace: Path | None = None, **lengths: str) -> dict[str, Any]:
    """What the options of made-up work are to a LoadTest. A trace is as long as its last arrival says."""
    from splitlearn.loadtest.lengths import Lengths
    from splitlearn.loadtest.trace import read_trace

    found: dict[str, Any] = {name: Lengths.parse(text, name) for name, text in lengths.items()}
    if trace is None:
        return found
    lines = read_trace(trace)
    return {**found, "trace": lines, "duration_s": max(SHORTEST_TRACE_S, lines[-1].at_s)}


def _refuse(where: str, **given: object) -> None:
    """Raise InputError for an option that means nothing here."""
    for name, value in given.items():
        if value:
            shown = str(value) if isinstance(value, Path) else value
            raise InputError(f"--{name.replace('_', '-')}", shown, f"none: it is only {where}")


def _load_trunk(settings: "Config", asked: "LoadTest", out: Path | None, as_json: bool) -> None:
    from splitlearn.cli import loadtest_run, loadtest_trunk  # after what may be refused at once

    loadtest_run.run(partial(loadtest_trunk.load_trunk, settings, asked), out, as_json=as_json)


def _load_endpoint(endpoint: "Endpoint", asked: "LoadTest", out: Path | None, as_json: bool) -> None:
    from splitlearn.cli import loadtest_run, loadtest_url
    from splitlearn.runtime import proxies

    proxies.settle()
    loadtest_run.run(partial(loadtest_url.load_endpoint, endpoint, asked), out, as_json=as_json)
