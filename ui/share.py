"""Who may see the page, and from where: the login, and the public link through Gradio's tunnel.

The link is asked for beside the page, not before it, and is given up after TIMEOUT_S: Gradio itself can wait for more
than a minute, and for ever on a tunnel client that says nothing. The local page works meanwhile and afterwards.
"""

import os
import sys
import threading
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal
from urllib.parse import urlparse

from splitlearn.errors import SetupError

TIMEOUT_S = 30.0
State = Literal["off", "asked", "open", "failed"]


@dataclass
class Sharing:
    """Where the public link stands; written by the thread that asks for it, read by every page that is opened."""

    state: State = "off"
    message: str = ""

    @classmethod
    def of(cls, wanted: bool) -> "Sharing":
        """How it stands when the page starts."""
        return cls("asked", "Asking Gradio's tunnel service for a public link.") if wanted else cls()


def login(variable: str, share: bool, without_login: bool) -> tuple[str, str] | None:
    """The user and password that the environment variable holds; None when there is no login.

    Raises SetupError when what it holds is no `user:password`, and when a page is to be shared without a login.
    """
    held = os.environ.get(variable, "")
    user, colon, password = held.partition(":")
    if held and not (user and colon and password):
        raise SetupError(f"{variable} (ui.auth): expected user:password, both of them not empty.")
    if held:
        return user, password
    if share and not without_login:
        raise SetupError(
            f"A shared page needs a login. Set one, for example {variable}=user:password, and start again; "
            "or add --share-without-login to let in everybody who has the link."
        )
    return None


def open_link(demo: Any, sharing: Sharing, timeout_s: float = TIMEOUT_S) -> None:
    """Ask for a public link to the launched page `demo`; one message on the terminal says how it ended."""
    answers: SimpleQueue[str | Exception] = SimpleQueue()
    given_up = threading.Event()
    threading.Thread(target=_ask, args=(demo, answers, given_up), daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        given_up.set()
        answer = TimeoutError(f"the tunnel service did not answer within {timeout_s:g} s")
    if isinstance(answer, Exception):
        why = " ".join(str(answer).split()).rstrip(".:") or type(answer).__name__
        sharing.message = f"No public link: {why}. The page works on this machine; only the link is missing."
        sharing.state = "failed"
        print(sharing.message, file=sys.stderr, flush=True)
        return
    sharing.message = f"Public link: https://{urlparse(answer).netloc}"
    sharing.state = "open"
    print(sharing.message, flush=True)


def _ask(demo: Any, answers: "SimpleQueue[str | Exception]", given_up: threading.Event) -> None:
    from gradio import networking, tunneling  # here, so that a wrong configuration is found before Gradio is imported

    # launch(share=True) does this, too, but blocks, prints advice of its own, and says nothing to the page.
    try:
        host, service = demo.server_name.strip("[]"), networking.GRADIO_SHARE_SERVER_ADDRESS
        answers.put(networking.setup_tunnel(host, demo.server_port, demo.share_token, service, None))
    except Exception as error:  # whatever Gradio, httpx, the file system or the tunnel client raise
        answers.put(error)
    if given_up.is_set():  # nobody was told of a link, so there must be none
        for tunnel in list(tunneling.CURRENT_TUNNELS):
            tunnel.kill()
