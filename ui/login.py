"""Access to the page: the login, and the public link through Gradio's tunnel.

The link is requested while the page already runs, and given up after TIMEOUT_S: Gradio itself can wait for more than a
minute, and for ever on a tunnel client that sends nothing. The local page works in any case.
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

from splitlearn.access.quota import Accounts
from splitlearn.address import is_loopback
from splitlearn.config import Config, UiConfig
from splitlearn.errors import SetupError
from splitlearn.runtime.terminal import say

TIMEOUT_S = 30.0
State = Literal["off", "asked", "open", "failed"]
Login = tuple[str, str] | None
SHORTEST = 12
# Shortest rest of a password without FIRST_TRIES and repetitions.
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
    """State of the public link. The thread that requests it writes, every open page reads."""

    state: State = "off"
    message: str = ""
    host: str = ""

    @classmethod
    def of(cls, share: bool) -> "Sharing":
        """The state when the page starts."""
        return cls("asked", "Asking Gradio's tunnel service for a public link.") if share else cls()


def login(variable: str, share: bool, without_login: bool) -> Login:
    """User and password from the environment variable; None if there is no login.

    Raises SetupError if it is not `user:password`, if the page is to be shared without a login, or if the password of a
    shared page is easy to guess.
    """
    value = os.environ.get(variable, "")
    user, colon, password = value.partition(":")
    if value and not (user and colon and password):
        raise SetupError(f"{variable} (ui.auth): expected user:password, both of them not empty.")
    if value:
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
    """Raise SetupError if other machines reach the page without a login, or with a password that is easy to guess."""
    if settings.allow_open or is_loopback(settings.host):
        return
    if known is None:
        raise SetupError(
            f"ui.host: {settings.host!r} is reached from other machines, and there is no login. Set one, for example "
            f"{settings.auth}=user:{_example()}, or listen on 127.0.0.1, or, where everybody who can reach it may use "
            "it, say --allow-open (ui.allow_open)."
        )
    _check_password(settings.auth, *known)


def api_keys(settings: Config, known: Login) -> Accounts | None:
    """The keys of the endpoint under the page's port; None if there is none (`ui.api`).

    Raises SetupError if there are no keys and others reach the page, or it has a login.
    """
    ui, file = settings.ui, settings.api.tokens
    if not ui.api:
        return None
    if file is None and (known or ui.share or not (ui.allow_open or is_loopback(ui.host))):
        raise SetupError(
            "ui.api: the page has a login, or others reach it, and api.tokens is not set. Set it to a file of API keys "
            "(docs/openai-api.md), or leave ui.api out."
        )
    return Accounts.read(file, "api.tokens")


def _check_password(variable: str, user: str, password: str) -> None:
    """Raise SetupError for a password that is easy to guess. The error does not contain it."""
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
    """Request a public link to the launched page `demo`, and print the outcome."""
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
    from gradio import networking, tunneling  # here, so that a wrong configuration fails before Gradio is imported

    # launch(share=True) does this, too, but blocks, prints its own advice, and tells the page nothing.
    try:
        host, service = demo.server_name.strip("[]"), networking.GRADIO_SHARE_SERVER_ADDRESS
        answers.put(networking.setup_tunnel(host, demo.server_port, demo.share_token, service, None))
    except Exception as error:  # of Gradio, httpx, the file system or the tunnel client
        answers.put(error)
    if given_up.is_set():  # the caller reported no link, so there must be none
        for tunnel in list(tunneling.CURRENT_TUNNELS):
            tunnel.kill()
