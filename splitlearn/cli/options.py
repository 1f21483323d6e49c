"""Options that several commands share, and the settings they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.errors import InputError
from splitlearn.link.words import parse
from splitlearn.runtime import programs, proxies
from splitlearn.runtime.command_line import whole

if TYPE_CHECKING:
    from splitlearn.config import Config

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="settings (default: the checkout's config.yaml, else the defaults)"),
]
Flags = Annotated[
    str | None,
    typer.Option(
        "--flags",
        metavar="FLAGS",
        help="auto, default, all, none, a preset, a list a,b=choice, or one for each side: full:a client:b trunk:none",
    ),
]
Words = Annotated[list[str] | None, typer.Argument(metavar="SIDE:FLAGS", hidden=True)]
"""Words behind `--flags WORD` that are no options: the groups of the other sides."""
Trunks = Annotated[str | None, typer.Option("--trunk", metavar="HOST:PORT[,...]", help="overrides trunk.address")]
Link = Annotated[
    str | None,
    typer.Option("--link", metavar="LINK", help="emulate a link: wifi, 4g, ... or rtt=50ms,up=10mbit,down=100mbit"),
]
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="prompts to use, one a line")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", parser=whole("max_new_tokens"), help="of the longest answer"),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", parser=whole("seed"), help="of all that is random")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="a new folder for the results")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout and nothing else there")]


def settings(path: Path | None, trunk: str | None = None, link: str | None = None) -> "Config":
    """The settings of `path`, or of the checkout, with another trunk address and emulated link where they are given."""
    from splitlearn import config as configuration  # slow to import, and not needed for --help

    proxies.settle()
    found = configuration.load(path or programs.own_config())
    found = found if trunk is None else configuration.with_trunk(found, trunk)
    return found if link is None else configuration.with_link(found, str(parse(link)))


def chosen_flags(flags: str | None, words: list[str] | None, config: "Config") -> str:
    """The words for flags. Raises InputError for words that follow no `--flags`."""
    if flags is None and words:
        raise InputError("argument", words[0], "options only; a prompt is given by --prompt TEXT, flags by --flags")
    return config.flags if flags is None else " ".join([flags, *(words or ())])


def given(**values: Any) -> dict[str, Any]:
    """Those of `values` that are not None; the others keep their defaults."""
    return {name: value for name, value in values.items() if value is not None}
