"""What stands before the page: each request is looked at before Gradio sees it, and each answer is given its headers.

`Guard` wraps Gradio's application. It answers those who ask for the page by its own names, from its own pages, for the
paths that the page needs, with a body of a size that a form has. Logins have a brake. Nothing can be uploaded.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitlearn.runtime import private_apis
from ui.guard.answer import Answer, uncompressed
from ui.guard.brake import Brake
from ui.guard.hosts import Hosts
from ui.janitor import tidy
from ui.language import choice

# A prompt may have as many tokens as a model can take, a Lab experiment a thousand prompts.
MOST_BYTES = 2 * 1024 * 1024
BODY_S = 30.0
# What one page may ask for before it has read the answers.
MOST_EVENTS = 32
API = "/gradio_api"
SESSION_NAME = r"[A-Za-z0-9_-]{1,64}"
SESSION_TEXT = "session_hash: expected at most 64 letters, digits, - and _."
SESSION = re.compile(SESSION_NAME)
# What a page needs before its visitor has logged in, and nothing of it says what is behind the login.
OPEN = re.compile(
    r"/|/zh|/login/?|/(assets|static|svelte)/.*|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
    rf"|{API}/(login_check|startup-events|user|app_id|theme\.css)/?"
)
# A file must not begin as an address does: Gradio would fetch it for whoever asks.
KNOWN = re.compile(
    rf"/config/?|/logout|{API}/(info/?|token/?|heartbeat/{SESSION_NAME}|queue/(join|data|status)|run/\w+/?|cancel|reset/?)"
    rf"|{API}/file=(?!/*[a-zA-Z][a-zA-Z0-9+.-]+:).*"
)
# With ui.mcp. Gradio has more paths for it, such as an older transport; no client needs them.
MCP = re.compile(rf"{API}/mcp/?")
CALLS = re.compile(rf"{API}/(queue/join|run/\w+/?)")


class Refusal(Exception):
    """A request that is answered here, in one line."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def guarded(hosts: Hosts) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan that puts a Guard before Gradio's application. It begins before the first connection is accepted.

    A middleware of Gradio's would stand behind its CORS, which answers some requests itself.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        guard = Guard(app.middleware_stack, app, hosts)
        app.middleware_stack = guard
        tidying = asyncio.create_task(tidy(app, guard.reading))
        try:
            yield
        finally:
            tidying.cancel()

    return lifespan


class Guard:
    """An ASGI application before `app`, the one of the launched page `gradio_app`."""

    def __init__(self, app: ASGIApp, gradio_app: Any, hosts: Hosts) -> None:
        self._app, self._page, self._hosts = app, gradio_app, hosts
        self._brake = Brake()
        # The sessions whose answers somebody reads now.
        self.reading: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # Gradio has no WebSocket
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(Request(scope), receive, send)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        sent = Answer(request, send)
        try:
            self._check(request)
            if request.method == "POST":
                receive = await self._body(request, receive)
            address = self._login(request)
        except Refusal as refusal:
            refused = PlainTextResponse(f"{refusal}\n", refusal.status, refusal.headers)
            await refused(request.scope, receive, sent)
            return
        path = request.url.path
        if path == "/" and (language := choice.of(request)) != "en":
            await RedirectResponse(_page_of(language, request), 303)(request.scope, receive, sent)
            return
        if path in choice.PAGES:
            uncompressed(request)
        with self._counting(request):
            await self._app(request.scope, receive, sent)
        if address is not None and sent.status == 200:
            self._brake.give_back(address)

    def _check(self, request: Request) -> None:
        """Raises Refusal for a request that is not the page's."""
        path = request.url.path
        if not self._hosts.asked_for(request):
            host = request.headers.get("host", "")[:100]
            raise Refusal(400, f"Host: {host!r} is no name of this page. ui.allowed_hosts in config.yaml adds names.")
        if not self._hosts.came_from(request):
            raise Refusal(403, "Origin: another page must not act here. ui.allowed_hosts adds names of this page.")
        if request.method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, "Method: expected GET, HEAD or POST.", {"Allow": "GET, HEAD, POST"})
        if OPEN.fullmatch(path):
            return
        if not (KNOWN.fullmatch(path) or (MCP.fullmatch(path) and self._page.get_blocks().mcp_server)):
            raise Refusal(404, "Not found.")
        if self._page.auth is not None and self._user(request) is None:
            raise Refusal(401, "Not logged in.")
        if not all(map(SESSION.fullmatch, request.query_params.getlist("session_hash"))):
            raise Refusal(400, SESSION_TEXT)

    def _user(self, request: Request) -> str | None:
        """Who has logged in, by one of Gradio's two cookies."""
        names = (f"access-token-{self._page.cookie_id}", f"access-token-unsecure-{self._page.cookie_id}")
        known = (self._page.tokens.get(request.cookies.get(name)) for name in names)
        return next((user for user in known if user is not None), None)

    async def _body(self, request: Request, receive: Receive) -> Receive:
        """Read the body, all of it, and look at it; what is given back reads it again."""
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            raise Refusal(408, f"Body: expected within {BODY_S:g} s.") from None
        if CALLS.fullmatch(request.url.path):
            self._check_call(body)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    def _check_call(self, body: bytes) -> None:
        """A call of one of the page's functions: which one, by whom, with plain values. Gradio takes a file or an
        address in the place of any value, and fetches it."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "Body: expected JSON.") from None
        if not isinstance(call, dict) or not isinstance(call.get("data"), list):
            raise Refusal(400, "data: expected a list of values.")
        if not all(map(_is_plain, call["data"])):
            raise Refusal(400, "data: expected texts, numbers, true, false, null, or lists of texts.")
        session, function = call.get("session_hash"), call.get("fn_index")
        if session is not None and not (isinstance(session, str) and SESSION.fullmatch(session)):
            raise Refusal(400, SESSION_TEXT)
        blocks = self._page.get_blocks()
        if function is not None and not (isinstance(function, int) and function in blocks.fns):
            raise Refusal(404, "fn_index: no such function.")
        if function is not None and len(call["data"]) != (wanted := len(blocks.fns[function].inputs)):
            raise Refusal(400, f"data: expected {wanted} values.")
        if len(private_apis.page_queue(blocks).pending_event_ids_session.get(session, ())) >= MOST_EVENTS:
            raise Refusal(429, f"{MOST_EVENTS} answers wait to be read.", {"Retry-After": "5"})

    def _login(self, request: Request) -> str | None:
        """Take a try of a login for its address. Raises Refusal where there is none now."""
        if request.method != "POST" or request.url.path.rstrip("/") != "/login":
            return None
        address = request.client.host if request.client else ""
        if wait_s := self._brake.take(address):
            said = f"Too many wrong logins: try again in {wait_s} s."
            raise Refusal(429, said, {"Retry-After": f"{wait_s}"})
        return address

    @contextmanager
    def _counting(self, request: Request) -> Iterator[None]:
        """Count a session as read while its answers are."""
        session = request.query_params.get("session_hash") if request.url.path == f"{API}/queue/data" else None
        if session is None:
            yield
            return
        self.reading[session] += 1
        try:
            yield
        finally:
            self.reading[session] -= 1
            if not self.reading[session]:
                del self.reading[session]


def _page_of(language: choice.Language, request: Request) -> str:
    """Where the page in `language` is, beside this one, whatever stands before it."""
    query = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != choice.NAME])
    return language + ("?" + query if query else "")


async def _read(receive: Receive) -> bytes:
    """The whole body. Raises Refusal for one that is too long, before it is all there."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "Body: cut off.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"Body: expected at most {MOST_BYTES} bytes.", {"Connection": "close"})
    return bytes(body)


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str | int | float)
