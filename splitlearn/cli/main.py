"""The command line: `python -m splitlearn compare|bench|report|load|fetch|models|parts|flags`.

Results go to stdout, progress and errors to stderr. What cannot be done ends with status 2 and one line that says why.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from splitlearn import config as configuration
from splitlearn.config import Config
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import GenerationRequest
from splitlearn.runtime import home, proxies
from splitlearn.runtime.arguments import OneLineParser
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import guarded, say

DEFAULT_CONFIG = Path("config.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for what could not be done as asked, 130 for Ctrl-C,
    141 where nobody reads what it writes."""
    home.settle()
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace, Config], None] = options.command
        proxies.settle()
        command(options, _config(options))
    except BrokenPipeError:
        raise  # of stdout: `guarded` ends quietly
    except (SplitlearnError, OSError) as error:  # of the system: no space, no permission
        say(f"error: {error}", stderr=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _config(options: argparse.Namespace) -> Config:
    path: Path | None = options.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    return configuration.load(path)


def _number(field: str, kind: Callable[[str], float], expected: str) -> Callable[[str], float]:
    """A converter for an option: text that is no number is an InputError like any other value that cannot be used."""

    def convert(text: str) -> float:
        try:
            return kind(text)
        except ValueError as error:
            raise InputError(field, text, expected) from error

    return convert


def _whole(field: str) -> Callable[[str], float]:
    return _number(field, int, "a whole number")


def _real(field: str) -> Callable[[str], float]:
    return _number(field, float, "a number")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m splitlearn", description="Compare full and split inference.")
    shared = OneLineParser(add_help=False)
    shared.add_argument("--config", type=Path, help="settings (default: config.yaml in this folder, if there is one)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace, Config], None], words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[shared], help=words, description=words)
        made.set_defaults(command=command)
        return made

    _add_compare_options(add("compare", _compare, "Run one prompt through the full and the split model."))
    _add_bench_options(add("bench", _bench, "Measure what each flag does, so that it can be defended."))
    _add_report_options(add("report", _report, "Show an experiment of `bench`, or hold two against each other."))
    _add_load_options(add("load", _load, "Load a trunk server with many clients at once, and say what they got."))
    add("fetch", _fetch, "Fetch and convert the configured model, if the cache does not have it.")
    add("models", _models, "List the catalogue, and what is cached.")
    parts = add("parts", _parts, "What client and trunk hold, and what crosses the wire, for the configured model.")
    parts.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    flags = add("flags", _flags, "List the optimization flags and where they can be applied.")
    flags.add_argument("--markdown", action="store_true", help="print docs/flags.md")
    return parser


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="(default: generation.prompt)")
    parser.add_argument(
        "--max-new-tokens", type=_whole("max_new_tokens"), metavar="N", help="(default: generation.max_new_tokens)"
    )
    _add_flags_option(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="go on to the limit, for measuring")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    form.add_argument("--chat-template", metavar="NAME", help="apply the one with this name, of a model with several")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where this text comes up")
    parser.add_argument(
        "--temperature", type=_real("temperature"), default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument("--top-k", type=_whole("top_k"), default=0, metavar="K", help="0 filters nothing (default)")
    parser.add_argument("--top-p", type=_real("top_p"), default=1.0, metavar="P", help="1 filters nothing (default)")
    parser.add_argument(
        "--repetition-penalty", type=_real("repetition_penalty"), default=1.0, metavar="R", help="1 is none (default)"
    )
    parser.add_argument("--seed", type=_whole("seed"), default=0, metavar="S", help="of sampling (default 0)")
    parser.add_argument(
        "--samples",
        type=_whole("samples"),
        default=1,
        metavar="N",
        help="answers at once, with seed S, S + 1, ...; they share each trip to the trunk (default 1)",
    )
    parser.add_argument("--trunk", metavar="HOST:PORT[,...]", help="overrides trunk.address")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")


def _add_flags_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flags",
        nargs="+",
        metavar="FLAGS",
        help="auto, default, all, none, a preset, a list a,b=choice, or one for each side: full:a client:b trunk:none",
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    _add_flags_option(parser)
    parser.add_argument("--design", default="without", help="without (all flags but one; default), alone or ladder")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--pairs", type=_whole("pairs"), metavar="N", help="exactly so many pairs, one look at the end")
    limit.add_argument(
        "--minutes", type=_real("minutes"), metavar="M", help="end after so long, decided or not (default 60)"
    )
    parser.add_argument(
        "--delta", type=_real("delta"), metavar="D", help="a ratio this near to 1 counts as no effect (default 0.02)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: generation.prompt)")
    parser.add_argument("--max-new-tokens", type=_whole("max_new_tokens"), metavar="N", help="of each run (default 64)")
    parser.add_argument("--seed", type=_whole("seed"), metavar="S", help="of the order of the arms (default 0)")
    parser.add_argument("--trunk", metavar="HOST:PORT[,...]", help="overrides trunk.address")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: lab/ and the time)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the experiment in that folder")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object on stdout")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiments", type=Path, nargs="+", metavar="DIR", help="one folder of `bench`, or two")
    parser.add_argument("--ttft", type=_real("ttft"), metavar="S", help="service level in seconds (default 0.5)")
    parser.add_argument("--tps", type=_real("tps"), metavar="N", help="service level, decoding (default 20)")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object on stdout")


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    whole, real = _whole, _real
    parser.add_argument("--clients", type=whole("clients"), metavar="N", help="requests at once (default 8)")
    parser.add_argument(
        "--rate", type=real("rate"), metavar="R", help="open-loop: Poisson arrivals per second (default: closed-loop)"
    )
    parser.add_argument("--duration", type=real("duration"), metavar="S", help="seconds (default 30)")
    parser.add_argument(
        "--replay", action="store_true", help="clients without layers, which send recorded hidden states"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: eight of its own)")
    parser.add_argument(
        "--max-new-tokens", type=whole("max_new_tokens"), metavar="N", help="of the longest answer (default 64)"
    )
    parser.add_argument("--seed", type=whole("seed"), metavar="S", help="of lengths and arrivals (default 0)")
    parser.add_argument("--ttft", type=real("ttft"), metavar="S", help="service level in seconds (default 2)")
    parser.add_argument("--tpot", type=real("tpot"), metavar="S", help="service level in seconds (default 0.2)")
    parser.add_argument("--trunk", metavar="HOST:PORT", help="overrides trunk.address")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: load/ and the time)")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object on stdout")


def _request(options: argparse.Namespace, config: Config) -> GenerationRequest:
    from splitlearn.sampling import SamplingParams

    defaults = config.generation
    return GenerationRequest(
        prompt=defaults.prompt if options.prompt is None else options.prompt,
        max_new_tokens=defaults.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
        chat=_chat(options, defaults.chat),
        ignore_eos=options.ignore_eos,
        stop=tuple(options.stop),
        samples=options.samples,
        sampling=SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        ),
    )


def _chat(options: argparse.Namespace, usual: bool | str) -> bool | str:
    template: str | None = options.chat_template
    return False if options.raw else usual if template is None else template


def _compare(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.arms.compare import compare
    from splitlearn.arms.runs import Runs
    from splitlearn.cli.tables import print_comparison, watch

    request = _request(options, config)
    config = configuration.with_chat(config, request.chat)
    if options.trunk is not None:
        config = configuration.with_trunk(config, options.trunk)
    with on_console() as progress, Runs(config, progress) as runs:
        flags = runs.flags(" ".join(options.flags) if options.flags else config.flags)
        runs.check_trunk()
        found = compare(runs, request, flags, watch(progress, request.samples * request.max_new_tokens))
    if found is None:  # nothing sets the cancellation here
        raise SplitlearnError("The comparison ended early.")
    if options.json:
        say(json.dumps(found.as_json(), indent=2))
    else:
        print_comparison(found)


def _bench(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.lab.request import ExperimentRequest, read_prompts

    if options.trunk is not None:
        config = configuration.with_trunk(config, options.trunk)
    if options.resume is not None:
        from splitlearn.cli import lab as lab_command

        lab_command.resume(options.resume, config, as_json=options.json)
        return
    given = {
        "design": options.design,
        "pairs": options.pairs,
        "minutes": options.minutes,
        "delta": options.delta,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "prompts": read_prompts(options.prompts) if options.prompts else None,
    }
    flags = " ".join(options.flags) if options.flags else config.flags
    asked = ExperimentRequest(flags, **_given(given))
    from splitlearn.cli import lab as lab_command  # after what may be refused at once

    lab_command.run(asked, config, options.out, as_json=options.json)


def _load(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.lab.request import read_prompts
    from splitlearn.loadtest.plan import PROMPTS, Levels, LoadTest

    if options.trunk is not None:
        config = configuration.with_trunk(config, options.trunk)
    levels = {"ttft_s": options.ttft, "tpot_s": options.tpot}
    given = {
        "clients": options.clients,
        "rate": options.rate,
        "duration_s": options.duration,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
    asked = LoadTest(
        read_prompts(options.prompts or PROMPTS),
        replay=options.replay,
        levels=Levels(**_given(levels)),
        **_given(given),
    )
    from splitlearn.cli import loadtest as loadtest_command  # after what may be refused at once

    loadtest_command.run(asked, config, options.out, as_json=options.json)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that were given: the others keep their defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _report(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.cli import lab as lab_command
    from splitlearn.lab.analysis.pairing import ServiceLevel

    if len(options.experiments) > 2:
        raise InputError("experiments", len(options.experiments), "one folder, or two to hold against each other")
    if len(options.experiments) == 2 and (options.json or options.ttft is not None or options.tps is not None):
        raise InputError("experiments", 2, "one folder with --json, --ttft or --tps")
    level = ServiceLevel(**_given({"ttft_s": options.ttft, "decode_tps": options.tps}))
    lab_command.show(options.experiments, level, as_json=options.json)


def _fetch(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.checkpoints import catalogue

    with on_console() as progress:
        folder = catalogue.prepare(config.model, progress).folder
    say(str(folder))


def _models(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.checkpoints import catalogue
    from splitlearn.cli.tables import print_models

    print_models(catalogue.catalogue_status(config.model), catalogue.cache_folder(config.model))


def _parts(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.checkpoints import catalogue
    from splitlearn.cli.tables import print_parts
    from splitlearn.models.plan import SplitPlan
    from splitlearn.models.sizes import parts
    from splitlearn.wire.codec import DTYPES

    with on_console() as progress:
        files = catalogue.prepare(config.model, progress)
    plan = SplitPlan.of(config.split.start, config.split.end, files.n_layers)
    found = parts(files, plan, DTYPES[config.model.dtype])
    print_parts(found, as_json=options.json)


def _flags(options: argparse.Namespace, config: Config) -> None:
    from splitlearn.arms.runs import Runs
    from splitlearn.cli.tables import print_flags
    from splitlearn.flags.docs_page import markdown

    if options.markdown:
        say(markdown(), end="")
    else:
        with on_console() as progress, Runs(config, progress) as runs:
            known, chosen = runs.availability(), runs.flags(config.flags)
        print_flags(known, chosen)
