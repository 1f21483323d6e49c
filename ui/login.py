"""Who may see the page, and from where: the login, and the public link through Gradio's tunnel.

The link is asked for beside the page, not before it, and is given up after TIMEOUT_S: Gradio itself can wait for more
than a minute, and for ever on a tunnel client that says nothing. The local page works meanwhile and afterwards.
"""

import os
import re
import secrets
import threading
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any, Literal
from urllib.parse import urlparse

from splitlearn.address import is_loopback
from splitlearn.config import UiConfig
from splitlearn.errors import SetupError
from splitlearn.runtime.terminal import say

TIMEOUT_S = 30.0
State = Literal["off", "asked", "open", "failed"]
Login = tuple[str, str] | None
SHORTEST = 12
# What is left of a password without what anybody tries first.
SHORTEST_REST = 8
FIRST_TRIES = (
    "password",
    "passwort",
    "qwerty",
    "qwertz",
    "letmein",
    "welcome",
    "secret",
    "admin",
    "splitlearn",
    "gradio",
)


@dataclass
class Sharing:
    """Where the public link stands; written by the thread that asks for it, read by every page that is opened."""

    state: State = "off"
    message: str = ""
    host: str = ""

    @classmethod
    def of(cls, wanted: bool) -> "Sharing":
        """How it stands when the page starts."""
        return cls("asked", "Asking Gradio's tunnel service for a public link.") if wanted else cls()


def login(variable: str, share: bool, without_login: bool) -> Login:
    """The user and password that the environment variable holds; None when there is no login.

    Raises SetupError when what it holds is no `user:password`, when a page is to be shared without a login, and when
    its password is easy to guess.
    """
    held = os.environ.get(variable, "")
    user, colon, password = held.partition(":")
    if held and not (user and colon and password):
        raise SetupError(f"{variable} (ui.auth): expected user:password, both of them not empty.")
    if held:
        if share and not without_login:
            _check_password(variable, user, password)
        return user, password
    if share and not without_login:
        raise SetupError(
            f"A shared page needs a login. Set one, {variable}=user:password, for example with the password "
            f"{_example()}, and start again; "
            "or add --share-without-login to let in everybody who has the link."
        )
    return None


def check_open(settings: UiConfig, known: Login) -> None:
    """Raises SetupError for a page that others reach without a login, or with a password that is easy to guess."""
    if settings.allow_open or is_loopback(settings.host):
        return
    if known is None:
        raise SetupError(
            f"ui.host: {settings.host!r} is reached from other machines, and there is no login. Set one, for example "
            f"{settings.auth}=user:{_example()}, or listen on 127.0.0.1, or, where everybody who can reach it may use "
            "it, say --allow-open (ui.allow_open)."
        )
    _check_password(settings.auth, *known)


def _check_password(variable: str, user: str, password: str) -> None:
    """Raises SetupError, without the password, for one that is easy to guess."""
    rest = password.lower()
    for word in (user.lower(), user.lower()[::-1], *FIRST_TRIES):
        rest = rest.replace(word, "")
    rest = re.sub(r"(.+?)\1+", r"\1", rest)  # aaaa, abcabc
    steps = [ord(after) - ord(one) for one, after in pairwise(rest)]
    counted = sum(abs(step) == 1 for step in steps) > len(steps) / 2  # 1234, abcd
    if len(password) >= SHORTEST and len(rest) >= SHORTEST_REST and not counted:
        return
    raise SetupError(
        f"{variable} (ui.auth): the password is easy to guess, and others reach the page. Expected {SHORTEST} "
        f"characters or more, not counted up, not repeated, without the user's name, for example {_example()}."
    )


def _example() -> str:
    return secrets.token_urlsafe(15)


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
        say(sharing.message, stderr=True)
        return
    sharing.host = urlparse(answer).netloc.lower()
    sharing.message = f"Public link: https://{sharing.host}"
    sharing.state = "open"
    say(sharing.message)


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
