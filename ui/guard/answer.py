"""Security headers and cookie attributes of every response of the page."""

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
# 'unsafe-eval': Gradio compiles the templates of gr.HTML, which are its own text and never a value. Gradio and plotly
# write style attributes, and plotly draws pictures from data: and blob:.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
SCRIPT = re.compile(rb"<script(?=[\s>])")
# Gradio takes its own words and the document's language from navigator.language. This makes it the page's.
LANGUAGE = 'Object.defineProperty(navigator, "language", {{value: "{}"}});'
# Gradio counts the seconds of loading the page in each frame, and goes on when it is loaded. That takes up to 0.1 of a
# core from the arms that the page compares. Here it counts once a second.
SLOW_CLOCK = r"""{
  const frame = window.requestAnimationFrame.bind(window), clock = /performance\.now\(\)-\w+\(\w+\)\)\/1e3/;
  window.requestAnimationFrame = call => clock.test(call) ? setTimeout(call, 1000) : frame(call);
}"""


class Answer:
    """An ASGI `send` that adds this page's headers to Gradio's response. `status` is None until the response starts.

    Scripts in Gradio's own HTML get a nonce. Others, such as one in a model's text, do not run.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self.status: int | None = None
        self._page = choice.PAGES.get(request.url.path)
        self._chosen = self._page and choice.in_address(request)
        self._send = send
        self._secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        self._nonce = secrets.token_urlsafe(18)
        self._start: Message | None = None  # of an HTML response, held until its body is complete
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
        if self._body:  # HEAD has none, and its length is that of the body of GET
            first = f"<head><script>{LANGUAGE.format(choice.TAGS[self._page or 'en'])}{SLOW_CLOCK}</script>"
            self._body = self._body.replace(b"<head>", first.encode(), 1)
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
        """The cookie with HttpOnly and SameSite=Lax, and with Secure if the page was reached over HTTPS."""
        parts = [part.strip() for part in cookie.split(";")]
        kept = [part for part in parts if part.lower().partition("=")[0] not in ("samesite", "httponly")]
        secure = ["Secure"] if self._secure and "secure" not in (part.lower() for part in kept) else []
        return "; ".join([*kept, "HttpOnly", "SameSite=Lax", *secure])


def uncompressed(request: Request) -> None:
    """Drop Accept-Encoding, so that the response can be edited here."""
    headers = request.scope["headers"]
    request.scope["headers"] = [(name, value) for name, value in headers if name != b"accept-encoding"]
