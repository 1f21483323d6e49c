"""What stands before the endpoint: each request gets an id. Let in is who asks for the server by its own name, with an
API key where the server has keys, and with JSON of a known, bounded length.

A web site can point its own name at this machine (DNS rebinding); the Host header shows it. What else a site can make a
browser send here has no JSON content type.
"""

import re
from collections.abc import Callable
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitlearn.access.quota import Accounts, Quota
from splitlearn.openai_api import keys
from splitlearn.openai_api.failures import ApiError

MOST_BYTES = 2 * 1024 * 1024
DIGITS = 20
"""Of a length: Python reads no number of thousands of digits."""
ID_HEADER = "x-request-id"
OPEN = "/health"
"""The path that needs no key."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Door:
    """An ASGI application before `app`. `is_own` tells the server's names, `accounts` has its keys.

    The application finds the quota of a request in its state.
    """

    def __init__(self, app: ASGIApp, is_own: Callable[[str], bool], accounts: Accounts) -> None:
        self._app, self._is_own, self._accounts = app, is_own, accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        own = headers.get(ID_HEADER, "")
        identity = own if _ID.fullmatch(own) else uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[ID_HEADER] = identity
            await send(message)

        try:
            quota = self._let_in(scope, headers)
        except ApiError as refusal:
            await refusal.response()(scope, receive, named)
            return
        try:
            await self._app(_as_listed(scope, quota), receive, named)
        finally:
            quota.end()

    def _let_in(self, scope: Scope, headers: Headers) -> Quota:
        """The quota of a request, which counts it until its end. Raises ApiError for one that is not let in."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            said = f"Host: {headers.get('host', '')[:100]!r} is no name of this server; allowed_hosts adds names."
            raise ApiError(400, said, code="wrong_host")
        account = None if _path(scope) == OPEN else keys.account(self._accounts, headers)
        if scope["method"] != "POST":
            return Quota()
        _check_body(headers)
        return keys.session(account)


def _as_listed(scope: Scope, quota: Quota) -> Scope:
    """The request as the paths are listed: without a slash at its end, GET in the place of HEAD, whose answer uvicorn
    sends without its body."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": _path(scope), "state": {**scope.get("state", {}), "quota": quota}}


def _path(scope: Scope) -> str:
    return str(scope["path"]).rstrip("/") or "/"


def _check_body(headers: Headers) -> None:
    """Raise ApiError unless the body is JSON of a known, bounded length."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: expected application/json.", code="unsupported_media_type")
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(411, "Body: expected with a Content-Length.", code="length_required")
    if len(length) > DIGITS or int(length) > MOST_BYTES:
        raise ApiError(413, f"Body: {length[:DIGITS]} bytes; expected at most {MOST_BYTES}.", code="too_long")
