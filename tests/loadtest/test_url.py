"""A load test of any server of the OpenAI protocol: what is measured of ours and of strangers', and what a hostile one
can do."""

import asyncio
import json
import signal
import ssl
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trustme

from bench.relay import relay
from splitlearn.cli import main as command_line
from splitlearn.errors import EndpointError, EndpointFull
from splitlearn.loadtest import endpoint
from splitlearn.loadtest.clients import AnswerEnd
from splitlearn.loadtest.endpoint import FORMS, Endpoint
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.loadtest.url_clients import Connection, UrlClient, connected
from tests.e2e.test_cli import Refusal, refusal
from tests.support.foreign import STREAM, Asked, Behaviour, event, foreign, text, usage, well
from tests.support.forks import Fork
from tests.support.trunk import eventually

__all__ = ["refusal"]

LOAD = LoadTest(("Why is the sky blue?", "How?"), clients=2, duration_s=0.5, max_new_tokens=8)
JOB = LoadRequest(0, 5)
KEY = "secret-of-the-tests"
MOST_SENT = 64 << 20
"""Far above what the limits let through, and far below what would fill the memory."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answered(target: Endpoint) -> list[Any]:
    """What a client gives for JOB."""
    connection = Connection(target)
    try:
        return list(UrlClient(connection, LOAD).answer(JOB))
    finally:
        connection.close()


def load(*arguments: str) -> list[str]:
    return ["loadtest", "--max-new-tokens", "8", "--clients", "2", "--duration", "1", "--out", "found", *arguments]


def test_tokens_are_those_of_the_usage_and_times_those_of_the_chunks() -> None:
    with foreign(well) as server:
        *chunks, end = answered(Endpoint(server.url, "one"))
    assert len(chunks) == 3
    assert isinstance(end, AnswerEnd)
    assert (end.tokens, end.prompt_tokens, end.server_ttft_s) == (5, 5, None)
    assert chunks == sorted(chunks)
    assert end.at >= chunks[-1], "the chunk that ends the answer has no text, and may stand for the end token"


async def never(asked: Asked) -> None:
    await asyncio.Event().wait()


async def endless_headers(asked: Asked) -> None:
    await asked.send("HTTP/1.1 200 OK\r\n")
    for number in count():
        await asked.send(f"X-{number}: {'x' * 1000}\r\n")


async def endless_interim(asked: Asked) -> None:
    while True:
        await asked.send("HTTP/1.1 100 Continue\r\n\r\n")


async def endless_line(asked: Asked) -> None:
    await asked.send(STREAM + "data: ")
    while True:
        await asked.send("x" * 65536)


async def endless_answer(asked: Asked) -> None:
    await asked.send(STREAM)
    while True:
        await asked.send(text("so ") * 1000)


async def endless_error(asked: Asked) -> None:
    await asked.send("HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n")
    while True:
        await asked.send("x" * 65536)


async def lost(asked: Asked) -> None:
    await asked.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda")


def sends(*events: str, head: str = STREAM) -> Behaviour:
    async def behave(asked: Asked) -> None:
        await asked.send(head + "".join(events))

    return behave


def refuses(line: str, message: str = "full", headers: str = "") -> Behaviour:
    async def behave(asked: Asked) -> None:
        await asked.status(line, headers, message=message)

    return behave


DONE = "data: [DONE]\n\n"
FAULTS: dict[str, tuple[Behaviour, str]] = {
    "full": (refuses("429 Too Many Requests"), "HTTP 429 Too Many Requests: full"),
    "error": (refuses("500 Oh"), "HTTP 500 Oh: full"),
    "key": (refuses("401 No", f"{KEY}\x1b[2J is wrong"), "HTTP 401 No: *** [2J is wrong"),
    "redirect": (refuses("307 Elsewhere", "", "Location: http://127.0.0.1:1/\r\n"), "HTTP 307 Elsewhere"),
    "cut": (sends(text("so")), "the stream ended without [DONE]"),
    "no usage": (sends(text("so"), DONE), "no usage at the end of the stream: its tokens cannot be counted"),
    "usage of text": (sends(text("so"), event(usage={"completion_tokens": "9"}), DONE), "no usage at the end"),
    "no text": (sends(usage(3), DONE), "an answer without text"),
    "no JSON": (sends("data: {so\n\n"), "what came is no JSON object"),
    "deep JSON": (sends(f"data: {'[' * 100_000}\n\n"), "what came is no JSON object"),
    "list": (sends("data: []\n\n"), "what came is no JSON object"),
    "shapes": (sends(event(choices=[3], usage=[]), event(choices={}, usage=1), DONE), "an answer without text"),
    "error in the stream": (sends(text("so"), event(error={"message": "broke"})), "an error in the stream: broke"),
    "no stream": (sends("<p>", head=STREAM.replace("event-stream", "html")), "the answer is no stream of events"),
    "compressed and full": (
        refuses("429 Too Many Requests", headers="Content-Encoding: gzip\r\n"),
        "HTTP 429 Too Many",
    ),
    "compressed": (sends(head=STREAM.replace("Conn", "Content-Encoding: gzip\r\nConn")), "the answer is compressed"),
    "no HTTP": (sends(head="SSH-2.0-OpenSSH\r\n\r\n"), "no HTTP, or the connection ended"),
    "lost": (lost, "no HTTP, or the connection ended within an answer"),
    "endless headers": (endless_headers, "no HTTP"),
    "endless line": (endless_line, "a line was longer than"),
    "endless answer": (endless_answer, "the answer was longer than"),
    "endless error": (endless_error, "HTTP 500 Oh"),
    "silent": (never, "no whole answer within 0.5 s"),
    "endless interim": (endless_interim, "no whole answer within 0.5 s"),
}


@pytest.mark.parametrize(("behaviour", "said"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_answer_ends_with_its_cause_and_within_bounds(
    behaviour: Behaviour, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "within 0.5 s" in said:
        monkeypatch.setattr(endpoint, "ANSWER_S", 0.5)
    with foreign(behaviour) as server, pytest.raises(EndpointError) as failure:
        answered(Endpoint(server.url, "one", key=KEY))
    assert said in str(failure.value)
    assert len(str(failure.value)) <= endpoint.SAID
    assert str(failure.value).isprintable()
    assert isinstance(failure.value, EndpointFull) == ("429" in said)
    if behaviour is not endless_interim:  # which takes no memory
        assert sum(asked.sent for asked in server.asked) < MOST_SENT


def test_what_cannot_be_connected_says_why() -> None:
    with foreign(well) as gone:
        pass
    for target, said in ((gone.url, "connection refused"), ("http://no.invalid/v1", "unknown host")):
        with pytest.raises(EndpointError, match=said):
            answered(Endpoint(target, "one"))


def test_certificates_are_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with foreign(well, tls=tls) as server:
        with pytest.raises(EndpointError, match="the certificate is not trusted"):
            answered(Endpoint(server.url, "one"))
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert len(answered(Endpoint(server.url, "one"))) == 4


@pytest.mark.parametrize("taken", FORMS, ids=str)
def test_a_request_has_a_form_that_the_server_takes(taken: endpoint.Form) -> None:
    async def particular(asked: Asked) -> None:
        strange = taken.limit not in asked.body or ("ignore_eos" in asked.body and not taken.ignore_eos)
        await (asked.status("400 Bad Request", message="unknown parameter") if strange else well(asked))

    with foreign(particular) as server, connected(Endpoint(server.url), LOAD) as connection:
        assert (connection.endpoint.model, connection.endpoint.form) == ("one", taken)


def test_the_key_is_sent_and_is_in_no_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def guarded(asked: Asked) -> None:
        known = asked.headers.get("authorization") == f"Bearer {KEY}"
        bad = len(asked.body["messages"][0]["content"]) % 2
        await (asked.status("500 Oh", message=f"{KEY}!") if bad or not known else well(asked))

    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    with foreign(guarded) as server:
        assert command_line.main(load("--url", server.url, "--key-env", "KEY_OF_TESTS")) == 0
    out = capsys.readouterr()
    assert "times: HTTP 500 Oh: ***!" in out.out
    assert KEY not in out.out + out.err
    assert all(KEY not in file.read_text(encoding="utf-8") for file in Path("found").iterdir())


def test_requests_of_every_state_are_counted_with_their_causes(capsys: pytest.CaptureFixture[str]) -> None:
    ways = (well, refuses("429 Too Many Requests"), refuses("503 Busy"), sends(text("so")), well)
    turns = count(-1)  # the first request is before the load

    async def changing(asked: Asked) -> None:
        await ways[max(0, next(turns)) % len(ways)](asked)

    with foreign(changing) as server:
        assert command_line.main(load("--url", server.url, "--rate", "40", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["offered"] == sum(summary[name] for name in ("done", "rejected", "failed", "incomplete"))
    assert min(summary["done"], summary["rejected"], summary["failed"]) > 0
    assert set(summary["reasons"]) == {
        "HTTP 429 Too Many Requests: full",
        "HTTP 503 Busy: full",
        "the stream ended without [DONE]",
    }


def test_ctrl_c_ends_a_load_whose_answers_never_end(tmp_path: Path) -> None:
    turns = count()

    async def stalls(asked: Asked) -> None:
        if next(turns) < 3:  # before the load: the form of requests, and each client
            await well(asked)
            return
        await asked.send(STREAM + text("so"))
        await never(asked)

    with foreign(stalls) as server:
        process = Fork(
            command_line.main, [*load("--url", server.url), "--duration", "600"], tmp_path, tmp_path / "errors"
        )
        try:
            assert eventually(lambda: process.poll() or len(server.asked) >= 5, within_s=120)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.close()
    summary = json.loads(Path("found/loadtest.json").read_text())["summary"]
    assert (summary["offered"], summary["incomplete"], summary["failed"]) == (2, 2, 0)


def test_ctrl_c_before_the_load_ends_the_command(tmp_path: Path) -> None:
    with foreign(never) as server:
        process = Fork(command_line.main, load("--url", server.url), tmp_path, tmp_path / "errors")
        try:
            assert eventually(lambda: process.poll() or server.asked, within_s=120)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.close()


def test_a_relay_sees_what_a_client_of_its_server_measures() -> None:
    with foreign(well) as server, relay(int(server.url.split(":")[2].split("/")[0])) as judge:
        first, *_, end = answered(Endpoint(f"http://127.0.0.1:{judge.port}/v1", "one"))
        (seen,) = judge.seen()
    assert seen.tokens == end.tokens
    assert judge.exchanges[0].begun + seen.ttft_s <= first
    assert seen.text_tpot_s <= seen.tpot_s


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "127.0.0.1:8000"), "url: '127.0.0.1:8000' cannot be used; expected an http or https URL"),
        (("--url", "ftp://here/v1"), "url: 'ftp://here/v1' cannot be used"),
        (("--url", "http://here:99999/v1"), "url: 'http://here:99999/v1' cannot be used"),
        (("--url", "http://me:hush@here/v1"), "url: 'http://here...' cannot be used"),
        (
            ("--url", "http://here/v1", "--replay"),
            "--replay: True cannot be used; expected none",
        ),
        (("--url", "http://here/v1", "--trunk", "here:1"), "--trunk: 'here:1' cannot be used"),
        (("--url", "http://here/v1", "--key-env", "NOT_SET"), "key-env: 'NOT_SET' cannot be used"),
        (("--model", "one"), "--model: 'one' cannot be used; expected none: it is only for --url"),
        (("--completions",), "--completions: True cannot be used"),
        (("--key-env", "HOME"), "--key-env: 'HOME' cannot be used"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(
    arguments: tuple[str, ...], said: str, refusal: Refusal, tmp_path: Path
) -> None:
    found = refusal.of(tmp_path, "loadtest", *arguments)
    assert said in found
    assert "hush" not in found


def test_a_key_that_is_no_header_is_refused_without_its_value(
    monkeypatch: pytest.MonkeyPatch, refusal: Refusal, tmp_path: Path
) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", "multi\nline")
    said = refusal.of(tmp_path, "loadtest", "--url", "http://here/v1", "--key-env", "KEY_OF_TESTS")
    assert "an API key of ASCII characters" in said
    assert "multi" not in said
