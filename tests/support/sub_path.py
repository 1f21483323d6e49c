"""A proxy that serves a page below a path of its own, as nginx does with `location /lab/`."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


@contextmanager
def proxied(url: str, path: str) -> Iterator[str]:
    """Run a proxy that serves `url` below `path`, and yield its URL. Every other path is a 404."""
    client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=None)  # noqa: S113  # answers are streams

    async def forward(request: Request) -> Response:
        inner = request.url.path.removeprefix(path)
        if inner == request.url.path:
            return PlainTextResponse("Not the page's.\n", 404)
        to = httpx.URL(url).copy_with(path=inner or "/", query=request.url.query.encode())
        forwarded = client.build_request(request.method, to, headers=request.headers.raw, content=await request.body())
        answer = await client.send(forwarded, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        response = StreamingResponse(body(), answer.status_code)
        cookies = [(b"set-cookie", cookie.encode()) for cookie in answer.headers.get_list("set-cookie")]
        response.raw_headers = [(n.encode(), v.encode()) for n, v in kept.items() if n != "set-cookie"] + cookies
        return response

    methods = ["GET", "HEAD", "POST", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", forward, methods=methods)])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}{path}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
