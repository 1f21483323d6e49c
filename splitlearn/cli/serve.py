"""`splitlearn serve`: the OpenAI protocol over both arms."""

import signal
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn import address
from splitlearn.cli import options
from splitlearn.flags.selection import check
from splitlearn.runtime import ports
from splitlearn.runtime.command_line import Job, whole
from splitlearn.runtime.terminal import say

if TYPE_CHECKING:
    from socket import socket

    from splitlearn.access.quota import Accounts
    from splitlearn.arms.startup import Startup
    from splitlearn.config import ApiConfig, Config

Port = Annotated[
    int | None, typer.Option(metavar="PORT", parser=whole("port"), help="overrides api.port; 0 takes a free one")
]
Host = Annotated[str | None, typer.Option(metavar="HOST", help="overrides api.host")]
AllowOpen = Annotated[
    bool | None,
    typer.Option(
        "--allow-open", help="listen beyond loopback without TLS and API keys: everybody who reaches the port may ask"
    ),
]

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection: a request is lost on one that the server closes at the same moment."""


def serve(
    port: Port = None,
    flags: options.Flags = None,
    words: options.Words = None,
    trunk: options.Trunks = None,
    link: options.Link = None,
    config: options.ConfigFile = None,
    host: Host = None,
    allow_open: AllowOpen = None,
) -> Job:
    """Serve the full and the split model by the OpenAI protocol. `splitlearn token NAME` makes an API key."""
    from splitlearn import config as configuration  # slow to import, and not needed for --help

    settings = options.settings(config, trunk, link)
    chosen = options.chosen_flags(flags, words, settings)
    check(chosen)
    api = {**settings.api.model_dump(), **options.given(port=port, host=host, allow_open=allow_open)}
    return partial(_serve, configuration.parse({**settings.model_dump(), "flags": chosen, "api": api}))


def _serve(settings: "Config") -> int:
    from splitlearn.arms.startup import Startup
    from splitlearn.planning.auto import settle

    api = settings.api
    accounts = _accounts(api)
    port = ports.check("api.", api.host, api.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in the same order as Ctrl-C
    startup = Startup(settings, at_once=True, settle=settle)
    try:
        startup.begin()
        _listen(startup, api.model_copy(update={"port": port}), accounts)
    except KeyboardInterrupt:
        pass
    finally:
        startup.close()
    return 0


def _accounts(api: "ApiConfig") -> "Accounts":
    """Check TLS and read the keys. Raises InputError for a file that cannot be used, SetupError for an endpoint that
    would be open to a network."""
    from splitlearn.access import network
    from splitlearn.access.quota import Accounts
    from splitlearn.wire import pem

    missing = "api.tls" if api.tls.certificate is None else "api.tokens" if api.tokens is None else ""
    network.check_open("api", api.host, api.allow_open, missing, "api.tls with api.tokens (docs/openai-api.md)")
    pem.pair("api.tls", api.tls.certificate, api.tls.key)
    return Accounts.read(api.tokens, "api.tokens")


def _listen(startup: "Startup", api: "ApiConfig", accounts: "Accounts") -> None:
    import uvicorn

    from splitlearn.access.network import Names
    from splitlearn.openai_api.answers import Line
    from splitlearn.openai_api.app import Endpoint

    app = Endpoint(startup, Line(api.max_running, api.max_waiting)).application(
        Names(api.host, api.allowed_hosts).has, accounts
    )
    host, tls = address.loopback(api.host) or api.host, api.tls

    class Server(uvicorn.Server):
        async def startup(self, sockets: "list[socket] | None" = None) -> None:
            await super().startup(sockets)
            say(f"The OpenAI protocol is on {address.url(host, api.port, tls.certificate is not None)}/v1")

    settings = uvicorn.Config(
        app,
        host=host,
        port=api.port,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=tls.certificate,
        ssl_keyfile=tls.key,
    )
    Server(settings).run()
