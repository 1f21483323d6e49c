"""Checks each request before Gradio sees it, and sets the headers of each response.

`Guard` wraps Gradio's application. It passes on requests to the page's own names, from its own pages, for the paths
that the page needs, with a body of a form's size. Wrong logins are rate-limited. Uploads are refused.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitlearn.runtime import private_apis
from ui.guard import login_page
from ui.guard.answer import Answer, uncompressed
from ui.guard.brake import Brake
from ui.guard.hosts import Hosts
from ui.janitor import tidy
from ui.language import choice

# Room for a prompt as long as a model's context, and for a Lab experiment of a thousand prompts.
MOST_BYTES = 2 * 1024 * 1024
BODY_S = 30.0
# Calls of one page whose answers it has not read yet.
MOST_EVENTS = 32
API = "/gradio_api"
SESSION_NAME = r"[A-Za-z0-9_-]{1,64}"
SESSION_TEXT = "session_hash: expected at most 64 letters, digits, - and _."
SESSION = re.compile(SESSION_NAME)
# What a page needs before its visitor logs in. None of it reveals what is behind the login.
OPEN = re.compile(
    r"/|/zh|/login/?|/(assets|static|svelte)/.*|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
    rf"|{API}/(login_check|startup-events|user|app_id|theme\.css)/?"
)
# A file must not look like a URL: Gradio would fetch it.
KNOWN = re.compile(
    rf"/config/?|/logout|{API}/(info/?|token/?|heartbeat/{SESSION_NAME}|queue/(join|data|status)|run/\w+/?|cancel|reset/?)"
    rf"|{API}/file=(?!/*[a-zA-Z][a-zA-Z0-9+.-]+:).*"
)
# With ui.api.
API_PATHS = re.compile(r"/v1(/.*)?", re.DOTALL)
# With ui.mcp. Gradio's other MCP paths, such as an older transport, are not needed.
MCP = re.compile(rf"{API}/mcp/?")
CALLS = re.compile(rf"{API}/(queue/join|run/\w+/?)")


class Refusal(Exception):
    """A request is refused, with a status and one line of text."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def guarded(hosts: Hosts, api: ASGIApp | None = None) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan that wraps Gradio's application in a Guard, before the first connection is accepted.

    It is no middleware of Gradio's, since that would run behind Gradio's CORS, which answers some requests itself.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        guard = Guard(app.middleware_stack, app, hosts, api)
        app.middleware_stack = guard
        tidying = asyncio.create_task(tidy(app, guard.reading))
        try:
            yield
        finally:
            tidying.cancel()

    return lifespan


class Guard:
    """An ASGI application in front of `app`, the one of the launched page `gradio_app`, and beside `api`, which has
    checks of its own (ui.api)."""

    def __init__(self, app: ASGIApp, gradio_app: Any, hosts: Hosts, api: ASGIApp | None = None) -> None:
        self._app, self._page, self._hosts, self._api = app, gradio_app, hosts, api
        self._brake = Brake()
        # Sessions whose answers are being read now.
        self.reading: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # Gradio has no WebSocket
            await send({"type": "websocket.close", "code": 1008})
        elif self._api is not None and API_PATHS.fullmatch(scope["path"]):
            await self._api(scope, receive, send)
        else:
            await self._answer(Request(scope), receive, send)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        answer = Answer(request, send)
        try:
            self._check(request)
            if request.method == "POST":
                receive = await self._body(request, receive)
            address = self._login(request)
        except Refusal as refusal:
            refused = PlainTextResponse(f"{refusal}\n", refusal.status, refusal.headers)
            await refused(request.scope, receive, answer)
            return
        path = request.url.path
        if path == "/" and (language := choice.of(request)) != "en":
            await RedirectResponse(_page_of(language, request), 303)(request.scope, receive, answer)
            return
        if path in choice.PAGES and self._is_locked(request):
            await HTMLResponse(login_page.html(choice.PAGES[path]))(request.scope, receive, answer)
            return
        if path in choice.PAGES:
            uncompressed(request)
        try:
            with self._counting(request):
                await self._app(request.scope, receive, answer)
        except RuntimeError as error:
            if not _is_late_404(error):
                raise
            await answer({"type": "http.response.body"})  # the end of what has begun
        if address is not None and answer.status == 200:
            self._brake.give_back(address)

    def _check(self, request: Request) -> None:
        """Raise Refusal for a request that no page sends."""
        path = request.url.path
        if not self._hosts.match(request):
            host = request.headers.get("host", "")[:100]
            raise Refusal(400, f"Host: {host!r} is no name of this page. ui.allowed_hosts in config.yaml adds names.")
        if not self._hosts.same_origin(request):
            raise Refusal(403, "Origin: another page must not act here. ui.allowed_hosts adds names of this page.")
        if request.method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, "Method: expected GET, HEAD or POST.", {"Allow": "GET, HEAD, POST"})
        if OPEN.fullmatch(path):
            return
        if not (KNOWN.fullmatch(path) or (MCP.fullmatch(path) and self._page.get_blocks().mcp_server)):
            raise Refusal(404, "Not found.")
        if self._is_locked(request):
            raise Refusal(401, "Not logged in.")
        if not all(map(SESSION.fullmatch, request.query_params.getlist("session_hash"))):
            raise Refusal(400, SESSION_TEXT)

    def _is_locked(self, request: Request) -> bool:
        """Whether a login is needed, and who asks has none."""
        return self._page.auth is not None and self._user(request) is None

    def _user(self, request: Request) -> str | None:
        """The logged-in user, by one of Gradio's two cookies."""
        names = (f"access-token-{self._page.cookie_id}", f"access-token-unsecure-{self._page.cookie_id}")
        known = (self._page.tokens.get(request.cookies.get(name)) for name in names)
        return next((user for user in known if user is not None), None)

    async def _body(self, request: Request, receive: Receive) -> Receive:
        """Read and check the whole body. Returns a `receive` that replays it."""
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            raise Refusal(408, f"Body: expected within {BODY_S:g} s.") from None
        if CALLS.fullmatch(request.url.path):
            self._check_call(body)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _check_call(self, body: bytes) -> None:
        """Check a call of one of the page's functions: known function, valid session, plain values. Gradio would fetch
        a file or URL in the place of any value."""
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
        if function is not None and len(call["data"]) != (expected := len(blocks.fns[function].inputs)):
            raise Refusal(400, f"data: expected {expected} values.")
        if len(private_apis.page_queue(blocks).pending_event_ids_session.get(session, ())) >= MOST_EVENTS:
            raise Refusal(429, f"{MOST_EVENTS} answers wait to be read.", {"Retry-After": "5"})

    def _login(self, request: Request) -> str | None:
        """Take a login try for the client's address and return the address. Raises Refusal if it has none left."""
        if request.method != "POST" or request.url.path.rstrip("/") != "/login":
            return None
        address = request.client.host if request.client else ""
        if wait_s := self._brake.take(address):
            text = f"Too many wrong logins: try again in {wait_s} s."
            raise Refusal(429, text, {"Retry-After": f"{wait_s}"})
        return address

    @contextmanager
    def _counting(self, request: Request) -> Iterator[None]:
        """Count the session in `reading` while its answers are read.

        Where two streams of one session break off, the second finds in Gradio's queue that the first has removed it,
        and Gradio 6 raises KeyError.
        """
        session = request.query_params.get("session_hash") if request.url.path == f"{API}/queue/data" else None
        if session is None:
            yield
            return
        self.reading[session] += 1
        try:
            yield
        except KeyError as missing:
            if missing.args != (session,):
                raise
        finally:
            self.reading[session] -= 1
            if not self.reading[session]:
                del self.reading[session]


def _is_late_404(error: RuntimeError) -> bool:
    """Whether Starlette raises it for a 404 that comes in the midst of a response. Gradio 6 raises one in the stream of
    a session that is gone, once the stream has said so: of a page that was left before it began to read, say."""
    return isinstance(error.__cause__, HTTPException) and error.__cause__.status_code == 404


def _page_of(language: choice.Language, request: Request) -> str:
    """The relative address of the page in `language`, so that a proxy's prefix stays."""
    query = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != choice.NAME])
    return language + ("?" + query if query else "")


async def _read(receive: Receive) -> bytes:
    """Read the whole body. Raises Refusal once it is longer than MOST_BYTES."""
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
