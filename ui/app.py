"""The command `python app.py`: read options and configuration, serve the page, shut down in order."""

import os
import signal
import threading
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from splitlearn import address, config
from splitlearn.access.quota import Accounts
from splitlearn.arms.startup import Startup
from splitlearn.checkpoints import catalogue
from splitlearn.config import AUTO, Config, UiConfig
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.flags.selection import check
from splitlearn.models.plan import plan_of
from splitlearn.planning.auto import settle
from splitlearn.runtime import collector, command_line, home, ports, private_apis, programs, proxies
from splitlearn.runtime.command_line import Job, whole
from splitlearn.runtime.terminal import say
from ui import login as page_login
from ui.login import Login

# Visitors whose state Gradio keeps.
MOST_STATES = 256
NAME = "python app.py"


app = command_line.program(add_completion=False)


@dataclass(frozen=True)
class Options:
    """Command-line options. None leaves the value to the configuration."""

    config: Path | None
    host: str | None
    port: int | None
    trunk: str | None
    allow_open: bool | None
    share: bool | None
    share_without_login: bool


def main(arguments: list[str]) -> int:
    """Serve the page until interrupted. Returns the exit status: 2 if it cannot start."""
    try:
        return command_line.run(app, arguments, NAME)
    except (SplitlearnError, OSError) as error:
        say(f"error: {error}", stderr=True)
        return 2
    except KeyboardInterrupt:
        return 0


@app.command()
def _page_command(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a config.yaml (default: the checkout's config.yaml, else the defaults)"),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="overrides ui.host")] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", parser=whole("port"), help="overrides ui.port; 0 takes a free one")
    ] = None,
    trunk: Annotated[str | None, typer.Option(metavar="HOST:PORT[,...]", help="overrides trunk.address")] = None,
    allow_open: Annotated[
        bool | None,
        typer.Option(
            "--allow-open", help="listen beyond loopback without a login: anyone who reaches the port can use the page"
        ),
    ] = None,
    share: Annotated[bool | None, typer.Option("--share", help="ask for a public link; demands a login")] = None,
    share_without_login: Annotated[
        bool, typer.Option("--share-without-login", help="let everybody in who has the link")
    ] = False,
) -> Job:
    """Compare a full and a split model on one page."""
    return partial(_start, Options(config, host, port, trunk, allow_open, share, share_without_login))


def _start(options: Options) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # shuts down in order, as Ctrl-C does
    home.settle()
    settings = _settings(options)
    proxies.settle(settings.ui.host)
    login = page_login.login(settings.ui.auth, settings.ui.share, options.share_without_login)
    page_login.check_open(settings.ui, login)
    _check_mcp(settings.ui.mcp)
    keys = page_login.api_keys(settings, login)
    port = ports.check("ui.", settings.ui.host, settings.ui.port)
    _serve(settings, port, login, keys, _repeat(options))


def _check_mcp(mcp: bool) -> None:
    """Raise SetupError if `mcp` is set and its package is not installed."""
    if mcp and find_spec("mcp") is None:
        raise SetupError("ui.mcp: true needs the package mcp, which is not installed; docs/api.md says how.")


def _settings(options: Options) -> Config:
    """The file's settings with the command line's changes, validated."""
    settings = config.load(options.config or programs.own_config()).model_dump()
    shared = options.share or options.share_without_login or None
    changes = {"host": options.host, "port": options.port, "allow_open": options.allow_open, "share": shared}
    settings["ui"] |= {name: value for name, value in changes.items() if value is not None}
    if options.trunk is not None:
        settings["trunk"]["address"] = options.trunk
    return config.parse(settings)


def _repeat(options: Options) -> list[str]:
    """The command-line options for the same settings."""
    given = {"--config": options.config, "--trunk": options.trunk}
    return [word for name, value in given.items() if value is not None for word in (name, str(value))]


def _serve(settings: Config, port: int, login: Login, keys: Accounts | None, repeat: list[str]) -> None:
    """Serve the page until interrupted. Model, trunk and both arms load in the background."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check(settings.flags)
    files = catalogue.find(settings.model)
    if files is not None and settings.split != AUTO:
        plan_of(settings, files.n_layers)
    startup = Startup(settings, settle=settle)
    try:
        startup.begin()
        _page(startup, port, login, keys, repeat)
    finally:
        startup.close()


def launch(demo: Any, url: str, **options: Any) -> None:
    """Launch the page at `url`. Raises SetupError if its port was taken after the check, or if it does not answer.

    Gradio requests its own page first. If that fails it raises a ValueError or an Exception with "localhost" in its
    text.
    """
    try:
        demo.launch(**options)
    except OSError as error:
        raise SetupError(f"ui.port: the page cannot be served ({error}).") from error
    except Exception as error:
        if "localhost" not in str(error):
            raise
        raise SetupError(
            f"ui.host: the page on {url} was started, but it did not answer this program in time. Start it again when "
            "the machine is less busy; if that does not help, see whether a firewall or a proxy is in between."
        ) from error


def _page(startup: Startup, port: int, login: Login, keys: Accounts | None, repeat: list[str]) -> None:
    with collector.resting():
        with private_apis.without_stub_files():
            import gradio  # noqa: F401  # before what imports it
        from ui.api import openai
        from ui.compare.actions import Handlers
        from ui.guard.hosts import Hosts
        from ui.guard.security import guarded
        from ui.page import blocks

    settings = startup.runs.config.ui
    sharing = page_login.Sharing.of(settings.share)
    hosts = Hosts(settings.host, settings.allowed_hosts, sharing)
    with Handlers(startup, repeat) as handlers:
        # Gradio does not copy files that are already in its folder; and this folder is removed at the end.
        os.environ["GRADIO_TEMP_DIR"] = str(handlers.downloads.folder)
        demo = blocks(handlers, sharing)
        url = address.url(settings.host, port)
        api = None if keys is None else openai.application(handlers, hosts, keys)
        launch(demo, url, **_options(settings, port), auth=login, app_kwargs={"lifespan": guarded(hosts, api)})
        demo.server.config.encoded_headers.clear()  # they name the server program
        if settings.mcp:
            private_apis.mcp_calls_as(demo, login)
        try:
            say(f"The page is on {url}")
            if api is not None:
                say(f"The OpenAI protocol is on {url}/v1")
            if settings.share:
                page_login.open_link(demo, sharing)
            threading.Event().wait()
        finally:
            handlers.end()
            demo.close(verbose=False)


def _options(settings: UiConfig, port: int) -> dict[str, Any]:
    """Gradio's options for the page, all but those that say who may come in."""
    from ui.theme import CSS, THEME

    return {
        "server_name": f"[{settings.host}]" if ":" in settings.host else settings.host,
        "server_port": port,
        "share": False,  # ui/login.py requests the link; None would let GRADIO_SHARE open one without a login
        "theme": THEME,
        "css": CSS,
        "prevent_thread_lock": True,
        "quiet": True,
        "state_session_capacity": MOST_STATES,
        "max_file_size": 1,  # of uploads, which the guard refuses before
        "enable_monitoring": False,
        "root_path": settings.root_path,
        "mcp_server": settings.mcp,
        "num_workers": 0,  # else processes serve files on their own ports
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
    }
