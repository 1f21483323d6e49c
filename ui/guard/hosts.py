"""Checks the Host, Origin and Sec-Fetch-Site headers of a request.

Host defends against DNS rebinding: another site points its own name at this machine. Origin and Sec-Fetch-Site defend
against requests that another site sends from its visitors' browsers.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import Request

from splitlearn.access.network import Names, name_of
from ui.login import Sharing

_USUAL_PORTS = ("80", "443")


class Hosts:
    """The page's names: those of a server that listens on `host`, `more` from the config, and the public link."""

    def __init__(self, host: str, more: Sequence[str], sharing: Sharing) -> None:
        self._sharing, self._more = sharing, {name.lower() for name in more}
        self._names = Names(host, more)

    def has(self, netloc: str) -> bool:
        """Whether `netloc`, a name or an address with or without a port, is one of the page's."""
        return self._names.has(netloc) or (name_of(netloc) or "?") == self._sharing.host

    def match(self, request: Request) -> bool:
        """Whether Host, and each X-Forwarded-Host of a proxy, is a name of the page."""
        forwarded = request.headers.getlist("x-forwarded-host")
        names = [*request.headers.getlist("host"), *(name.strip() for each in forwarded for name in each.split(","))]
        return len(request.headers.getlist("host")) == 1 and all(map(self.has, names))

    def same_origin(self, request: Request) -> bool:
        """Whether the request comes from the page itself, or from no page: the address bar, a link, a program."""
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
        names = (request.headers["host"], *request.headers.get("x-forwarded-host", "").split(","))
        own = {_without_usual_port(name.strip()) for name in names if name.strip()}
        # A proxy may forward another Host than the browser sent. The names in the config are for such proxies.
        return parts.scheme in ("http", "https") and (
            _without_usual_port(parts.netloc) in own or (parts.hostname or "") in self._more
        )


def _is_link(request: Request) -> bool:
    """Whether another site's link opens the page as a top-level document."""
    headers = request.headers
    opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return request.method == "GET" and request.url.path == "/" and opened


def _without_usual_port(netloc: str) -> str:
    name, colon, port = netloc.lower().rpartition(":")
    return name if colon and port in _USUAL_PORTS else netloc.lower()
