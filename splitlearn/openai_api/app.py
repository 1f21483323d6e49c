"""The paths of the endpoint, and the errors that all of them share. How a request is run is in answers.py."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from splitlearn.access.quota import Accounts
from splitlearn.arms.report import ArmReport
from splitlearn.arms.startup import ARMS, MODEL, Startup
from splitlearn.errors import SplitlearnError, did_you_mean
from splitlearn.events import Event, GenerationRequest
from splitlearn.openai_api import arms
from splitlearn.openai_api.answers import Found, Job, Line, run
from splitlearn.openai_api.door import Door
from splitlearn.openai_api.failures import RETRY_S, ApiError
from splitlearn.openai_api.keys import metered
from splitlearn.openai_api.requests import ChatRequest, CompletionRequest, Sampled
from splitlearn.openai_api.responses.request import ResponseRequest
from splitlearn.openai_api.responses.writer import ResponseWriter
from splitlearn.openai_api.streaming import AnswerWriter, Json, stream
from splitlearn.openai_api.wishes import Wishes
from splitlearn.openai_api.writer import Form, Writer, joined

PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
T = TypeVar("T")
Asked = ChatRequest | CompletionRequest | ResponseRequest
Write = Callable[[GenerationRequest], AnswerWriter]


class Endpoint:
    """Answers requests with the arms of `startup`. `line` says which of them run, and which wait."""

    def __init__(self, startup: Startup, line: Line) -> None:
        self._startup, self._runs, self._line = startup, startup.runs, line

    def application(self, is_own: Callable[[str], bool], accounts: Accounts) -> FastAPI:
        """The application of a server with these keys, with its OpenAPI page at /docs. `is_own` tells its names."""
        app = FastAPI(title="splitlearn", summary="The full model and the split one, by the OpenAI protocol")
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/responses")(self.responses)
        app.add_middleware(Door, is_own=is_own, accounts=accounts)
        app.exception_handler(ApiError)(_failed)
        app.exception_handler(RequestValidationError)(_invalid)
        app.exception_handler(HTTPException)(_unknown)
        app.exception_handler(Exception)(_broken)
        return app

    def health(self) -> JSONResponse:
        """200 once both arms can answer, 503 before, with what is loaded and what is not."""
        parts = {name: part.state for name, part in self._startup.parts().items()}
        ready = self._startup.settled(*parts) and not self._startup.failure
        return JSONResponse({"status": "ok" if ready else "loading", "parts": parts}, 200 if ready else 503)

    def models(self) -> Json:
        """The full model and the split one."""
        self._check_loaded()
        return {"object": "list", "data": [_described(each) for each in arms.ids(self._runs)]}

    def model(self, model: str) -> Json:
        """One of them; flags may stand behind a question mark, which is written %3F in a path."""
        self._check_loaded()
        arms.arm(self._runs, model)
        return _described(model)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer(asked, request, partial(_writer, "chat.completion", asked))

    async def completions(self, asked: CompletionRequest, request: Request) -> Response:
        """Continue texts, or token ids. Several are continued at once."""
        try:
            alone = asked.alone()
        except SplitlearnError as error:
            raise ApiError.of(error) from error
        doing = [self._answer(each, request, partial(_writer, "text_completion", each)) for each in alone]
        if len(doing) == 1:
            return await doing[0]
        return JSONResponse(joined([json.loads(bytes(answer.body)) for answer in await _together(doing)]))

    async def responses(self, asked: ResponseRequest, request: Request) -> Response:
        """Continue a conversation of typed items."""
        return await self._answer(asked, request, partial(ResponseWriter, asked))

    async def _answer(self, asked: Asked, request: Request, write: Write) -> Response:
        try:
            return await self._run(asked, asked.request(), request, write)
        except SplitlearnError as error:
            raise ApiError.of(error).renamed(asked.names) from error
        except ApiError as error:
            raise error.renamed(asked.names) from error

    async def _run(self, asked: Asked, generation: GenerationRequest, request: Request, write: Write) -> Response:
        self._check_loaded()
        wishes, quota = Wishes.of(request.headers), request.state.quota
        kind, flags = await asyncio.to_thread(arms.arm, self._runs, asked.model)
        job = Job(kind, flags, generation, wishes.priority, wishes.deadline_s, quota.holder)
        answered = run(self._runs, self._line, job)
        found, writer = metered(answered, quota, generation.prompt), write(generation)
        if not asked.stream:
            items = await _unless_gone(request, _all(found))
            events = [item for item in items if isinstance(item, Event)]
            reports = [item for item in items if isinstance(item, ArmReport)]
            return JSONResponse(writer.whole(events, reports[0]))
        first = await _unless_gone(request, anext(found))  # before the status is sent: it may be an error's
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(stream(writer, first, found), media_type="text/event-stream", headers=headers)

    def _check_loaded(self) -> None:
        """Raise ApiError until the model and both arms are loaded, as far as they fit."""
        startup = self._startup
        if startup.failure:
            raise ApiError(503, startup.failure, code="not_loaded")
        if not startup.settled(MODEL, *ARMS.values()):
            said = "The model is being loaded; /health says how far it is."
            raise ApiError(503, said, code="loading", headers={"Retry-After": str(RETRY_S)})


def _writer(form: Form, asked: Sampled, generation: GenerationRequest) -> Writer:
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    return Writer(form, asked.model, generation.samples, generation.echo, usage)


def _described(model: str) -> Json:
    return {"id": model, "object": "model", "created": 0, "owned_by": "splitlearn"}


async def _all(found: AsyncIterator[Found]) -> list[Found]:
    return [item async for item in found]


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of `work` gives. Where one fails the others are cancelled."""
    doing = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*doing)
    finally:
        for each in doing:
            each.cancel()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client goes."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ApiError(499, "The client has gone.")
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _broken(request: Request, error: Exception) -> Response:
    """What nobody foresaw: the server's log has the cause."""
    return ApiError(500, "The server failed; its log says why.", code="failed").response()


async def _invalid(request: Request, error: Exception) -> Response:
    """The first of pydantic's findings."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param}: this parameter is not supported here", param, "unsupported_parameter"
        ).response()
    if first["type"] == "json_invalid":
        return ApiError(400, "Body: expected JSON.", code="invalid_json").response()
    return ApiError(
        400, f"{param or 'body'}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value"
    ).response()


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        said = f"{request.method} is no method of {request.url.path}."
        return ApiError(405, said, code="method_not_allowed", headers=error.headers).response()
    if error.status_code != 404:  # JSON that Python's reader cannot read, such as lists 100,000 deep
        return ApiError(error.status_code, error.detail, code="invalid_request").response()
    said = f"{request.url.path} is no path of this server; there are {', '.join(PATHS)}"
    return ApiError(404, said + did_you_mean(request.url.path, PATHS), code="not_found").response()
