"""The line of requests, and what serve refuses."""

import asyncio
import threading

import pytest
from fastapi.testclient import TestClient

from splitlearn.access.network import Names
from splitlearn.access.quota import Accounts
from splitlearn.arms.startup import Startup
from splitlearn.cli import main as command_line
from splitlearn.config import Config
from splitlearn.errors import TrunkError, TrunkFull, TrunkUnavailable
from splitlearn.openai_api.answers import Line
from splitlearn.openai_api.app import Endpoint
from splitlearn.openai_api.failures import RETRY_S, ApiError
from splitlearn.openai_api.queue import Entry


def test_one_is_in_so_many_wait_and_one_more_is_refused_with_the_time_to_try_again() -> None:
    async def visit() -> ApiError:
        line, (first, second, third) = Line(1, 1), (Entry(), Entry(), Entry())
        await line.enter(first)
        waiting = asyncio.ensure_future(line.enter(second))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await line.enter(third)
        line.leave(first)
        await waiting
        return refused.value

    error = asyncio.run(visit())
    assert (error.status, error.code) == (429, "queue_full")
    assert int(error.headers["Retry-After"]) > 0


def test_who_leaves_the_line_keeps_nobody_out() -> None:
    async def visit() -> None:
        line, (first, left, stays) = Line(1, 1), (Entry(), Entry(), Entry())
        await line.enter(first)
        leaving = asyncio.ensure_future(line.enter(left))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        staying = asyncio.ensure_future(line.enter(stays))
        await asyncio.sleep(0)
        line.leave(first)
        await staying

    asyncio.run(visit())


def test_what_nobody_foresaw_is_said_in_the_envelope_too() -> None:
    app = Endpoint(Startup(Config()), Line(1, 0)).application(Names().has, Accounts())

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a secret")

    answer = TestClient(app, base_url="http://localhost", raise_server_exceptions=False).get("/broken")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")
    assert "secret" not in answer.text


def test_until_the_model_is_loaded_the_answer_is_when_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read, startup = threading.Event(), Startup(Config())
    monkeypatch.setattr(startup, "_read_model", read.wait)
    startup.begin()
    app = Endpoint(startup, Line(1, 0)).application(Names().has, Accounts())
    client = TestClient(app, base_url="http://localhost")
    body = {"model": "smollm2-135m-instruct:full", "prompt": "Hi"}
    for answer in (client.get("/v1/models"), client.post("/v1/completions", json=body)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/health").status_code == 503
    startup.close()
    read.set()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TrunkFull("no room", retry_s=7.4), 429, "trunk_full"),
        (TrunkUnavailable("gone"), 503, "trunk_unavailable"),
    ],
)
def test_a_trunk_without_room_or_out_of_reach_says_when_to_try_again(error: TrunkError, status: int, code: str) -> None:
    found = ApiError.of(error)
    assert (found.status, found.code) == (status, code)
    assert int(found.headers["Retry-After"]) == (7 if status == 429 else RETRY_S)


@pytest.mark.parametrize(
    ("options", "said"),
    [("--port 99999", "api.port"), ("--port abc", "port: 'abc'"), ("--flags warp", "flags: 'warp'")],
)
def test_what_cannot_be_served_is_one_line(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["serve", *options.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err
