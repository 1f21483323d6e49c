"""The headers of every answer of the page: what a browser may do with it, and with the cookies of a login."""

import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import Message, Send

from ui.language import choice

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), usb=(), serial=()",
}
# Gradio makes functions of the templates of gr.HTML ('unsafe-eval'): its own text, not a value's. Gradio and plotly
# write style attributes, and plotly draws pictures from data: and blob:.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
SCRIPT = re.compile(rb"<script(?=[\s>])")
# Gradio's own words, and the language of the document, follow the browser's language: here it is the page's.
LANGUAGE = '<head><script>Object.defineProperty(navigator, "language", {{value: "{}"}})</script>'


class Answer:
    """Sends what Gradio answers to `request`, with the headers of this page. `status` is None until it began.

    The scripts in Gradio's own HTML are given a nonce. Others, such as a model's text might bring, do not run.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self.status: int | None = None
        self._page = choice.PAGES.get(request.url.path)
        self._chosen = self._page and choice.asked(request)
        self._send = send
        self._secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        self._nonce = secrets.token_urlsafe(18)
        self._start: Message | None = None  # of HTML, whose body is held back until it is whole
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            self._set(headers)
            if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                self._start = message
                return
        if self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_html(self._start)

    async def _send_html(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        nonce = f" 'nonce-{self._nonce}'"
        headers["Content-Security-Policy"] = POLICY.format(nonce=nonce)
        if self._body:  # not for HEAD, whose length is that of another body
            self._body = self._body.replace(b"<head>", LANGUAGE.format(choice.TAGS[self._page or "en"]).encode(), 1)
            self._body = SCRIPT.sub(f'<script nonce="{self._nonce}"'.encode(), self._body)
            headers["Content-Length"] = str(len(self._body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": self._body})

    def _set(self, headers: MutableHeaders) -> None:
        headers.update({**HEADERS, "Content-Security-Policy": POLICY.format(nonce="")})
        cookies = headers.getlist("set-cookie")
        del headers["set-cookie"]
        for cookie in cookies:
            headers.append("set-cookie", self._strict(cookie))
        if self._chosen:
            headers.append("set-cookie", self._strict(choice.cookie(self._chosen)))

    def _strict(self, cookie: str) -> str:
        """The cookie, for requests from this page and links to it only, and over HTTPS where the page is reached so."""
        parts = [part.strip() for part in cookie.split(";")]
        kept = [part for part in parts if part.lower().partition("=")[0] not in ("samesite", "httponly")]
        secure = ["Secure"] if self._secure and "secure" not in (part.lower() for part in kept) else []
        return "; ".join([*kept, "HttpOnly", "SameSite=Lax", *secure])


def uncompressed(request: Request) -> None:
    """Ask for an answer that can be read here."""
    headers = request.scope["headers"]
    request.scope["headers"] = [(name, value) for name, value in headers if name != b"accept-encoding"]
