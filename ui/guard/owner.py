"""Whether a visitor is the owner of the page: logged in, or at this machine. Others may not change what is shared."""

from urllib.parse import urlsplit

import gradio as gr

from splitlearn.address import is_loopback_literal
from splitlearn.errors import SetupError

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
ONLY_OWNER = (
    "Only the owner of this page may do that: open it on its own machine by its loopback address, or set a login "
    "(ui.auth in config.yaml)."
)


def is_owner(request: gr.Request) -> bool:
    """Whether a visitor has logged in, or connects from this machine to a loopback name, without a proxy or public
    link."""
    if request.username:
        return True
    headers, client = request.headers, request.client
    try:
        name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:  # not a valid host
        return False
    direct = not any(header in headers for header in FORWARDED)
    return direct and client is not None and all(map(is_loopback_literal, (client.host, name)))


def check_owner(request: gr.Request) -> None:
    """Raise SetupError for a visitor who is not the owner."""
    if not is_owner(request):
        raise SetupError(ONLY_OWNER)
