"""How the app starts, and that what it started ends with it."""

import re
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from splitlearn.errors import SetupError
from tests.conftest import TinyFactory
from tests.support.page import END_S, START_S, App, launch_fails, running, write_config
from tests.support.trunk import eventually
from ui.app import launch

NOWHERE = "http://127.0.0.1:9"  # nobody listens there: who asks it fails at once


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"ui.port: cannot listen on 127.0.0.1:{port}" in launch_fails(
            write_config(tmp_path), "--port", str(port)
        )


@pytest.mark.parametrize(
    ("sections", "options", "said"),
    [
        ({"ui": {"prot": 1}}, (), "ui.prot"),
        ({}, ("--port", "70000"), "ui.port"),
        ({}, ("--trunk", "nowhere"), "trunk.address"),
        ({"model": {"name": "no such model"}}, (), "model.name"),
        ({}, ("--host", "0.0.0.0"), "ui.host: '0.0.0.0' is reached from other machines"),
        ({"ui": {"allowed_hosts": ["https://page.example"]}}, (), "ui.allowed_hosts"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    tmp_path: Path, sections: dict[str, object], options: tuple[str, ...], said: str
) -> None:
    assert said in launch_fails(write_config(tmp_path, **sections), *options)


class Silent:
    """Answers no HEAD, with which Gradio looks at the page before it says that it is there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = Response(status_code=503) if scope.get("method") == "HEAD" else self._app
        await app(scope, receive, send)


def test_a_page_that_gives_no_answer_is_one_line_that_names_its_address() -> None:
    import gradio

    with gradio.Blocks() as demo:
        gradio.Markdown("a page")
    middleware = {"middleware": [Middleware(Silent)]}
    try:
        with pytest.raises(SetupError) as refused:
            launch(
                demo, "http://127.0.0.1:7860/", share=False, quiet=True, prevent_thread_lock=True, app_kwargs=middleware
            )
    finally:
        demo.close(verbose=False)
    said = str(refused.value)
    assert "the page on http://127.0.0.1:7860/ was started" in said
    assert "\n" not in said and "share" not in said


def test_children_end_with_an_app_that_is_killed(tiny_model: TinyFactory, tmp_path: Path) -> None:
    app = App(write_config(tmp_path, model={"name": str(tiny_model().folder)}), fresh=True)
    app.url()
    assert eventually(app.trunks, within_s=START_S)
    children = app.children()
    assert set(app.trunks()) <= set(children)
    assert app.end(signal.SIGKILL) == -signal.SIGKILL
    assert not psutil.wait_procs(children, timeout=END_S)[1]


def test_a_page_starts_behind_proxies_that_lead_nowhere_and_a_trunk_that_is_not_there_is_a_warning(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model={"name": str(tiny_model().folder)})
    proxies = {"HTTP_PROXY": NOWHERE, "http_proxy": NOWHERE, "ALL_PROXY": "socks://127.0.0.1:9", "no_proxy": "[::1]"}
    with running(config, "--trunk", "127.0.0.1:9", environment=proxies, fresh=True) as app:
        assert httpx.get(app.url(), trust_env=False).status_code == 200
        app.wait_for(re.compile(r"warning.*127\.0\.0\.1:9"))
