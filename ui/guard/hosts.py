"""Under which names the page may be reached, and from which pages requests may come.

A web site can point its own name at this machine (DNS rebinding), and can send requests here from the browsers of its
visitors. The first shows in the Host header, the second in Origin and Sec-Fetch-Site.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import Request

from splitlearn.address import is_loopback_literal
from ui.login import Sharing

_NETLOC = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>\d{1,5}))?")
_USUAL_PORTS = ("80", "443")


class Hosts:
    """The names of the page: those of loopback, `host` that it listens on, `more` from the config, and the public link.

    A page that listens on all addresses is reached by any of them and by the machine's name. An address in the place
    of a name is no danger: nobody else can point it here.
    """

    def __init__(self, host: str, more: Sequence[str], sharing: Sharing) -> None:
        self._sharing, self._more = sharing, {name.lower() for name in more}
        self._everywhere = host in ("", "0.0.0.0", "::", "[::]")
        own = {socket.gethostname().lower()} if self._everywhere else {host.lower().strip("[]")}
        self._names = own | self._more

    def has(self, netloc: str) -> bool:
        """Whether `netloc`, a name or an address with or without a port, is the page."""
        found = _NETLOC.fullmatch(netloc.lower())
        if found is None:
            return False
        name = found["name"].strip("[]").removesuffix(".")
        if is_loopback_literal(name) or name in self._names or name == self._sharing.host:
            return True
        return self._everywhere and _is_address(name)

    def asked_for(self, request: Request) -> bool:
        """Whether the request is for the page by one of its names, also as a proxy before it says."""
        forwarded = request.headers.getlist("x-forwarded-host")
        said = [*request.headers.getlist("host"), *(name.strip() for each in forwarded for name in each.split(","))]
        return len(request.headers.getlist("host")) == 1 and all(map(self.has, said))

    def came_from(self, request: Request) -> bool:
        """Whether the request comes from the page itself, or from no page: a person, a link, a program."""
        origins = request.headers.getlist("origin")
        if origins:
            return len(origins) == 1 and self._is_own(origins[0], request)
        site = request.headers.get("sec-fetch-site", "none")
        return site in ("none", "same-origin") or _is_link(request)

    def _is_own(self, origin: str, request: Request) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        said = (request.headers["host"], *request.headers.get("x-forwarded-host", "").split(","))
        own = {_without_usual_port(name.strip()) for name in said if name.strip()}
        # A proxy may hand on another Host than the browser's; the names in the config are those of such proxies.
        return parts.scheme in ("http", "https") and (
            _without_usual_port(parts.netloc) in own or (parts.hostname or "") in self._more
        )


def _is_link(request: Request) -> bool:
    """A link from elsewhere to the page itself, opened as a page of its own."""
    headers = request.headers
    opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return request.method == "GET" and request.url.path == "/" and opened


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_usual_port(netloc: str) -> str:
    name, colon, port = netloc.lower().rpartition(":")
    return name if colon and port in _USUAL_PORTS else netloc.lower()
