"""What strangers can send at little cost: who has a token goes on beside it, and nothing is held for them for long."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from bench import floods
from bench.floods import DESCRIBE, FLOODS, HEALTH, PREFACE, SESSION, SETTINGS, begun, closed, connected, frame
from server import connections, endpoint
from server.auth import gate
from server.monitoring import logs
from splitlearn.access import tokens as token_file
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import describe
from splitlearn.wire import SERVICE
from splitlearn.wire.channel import NONE, Credentials, open_channel
from tests.conftest import TinyFactory
from tests.support.pki import Authority
from tests.support.trunk import Raw, TrunkHere, eventually, hidden, opening, serve_here, step, tensor_of

ANN, BOB = "secret-of-ann", "secret-of-bob"
SEEN, OTHER = Credentials(token=ANN), Credentials(token=BOB)
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
OPEN_S = 0.5
CALLS = 130
FULL, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    entries = [
        {"name": name, "sha256": token_file.digest(secret), "sessions": 3, "tokens_per_second": 1e6}
        for name, secret in (("ann", ANN), ("bob", BOB))
    ]
    path: Path = tmp_path_factory.mktemp("floods") / "tokens.yaml"
    path.write_text(yaml.safe_dump(entries))
    return str(path)


@pytest.fixture(scope="module")
def patient(files: ModelFiles, tokens: str) -> Iterator[TrunkHere]:
    """A server that waits long for a first message: what it gives way to is not time that has passed."""
    with serve_here(files, tokens=tokens, open_s=600.0) as running:
        yield running


@pytest.fixture(scope="module")
def brisk(files: ModelFiles, tokens: str) -> Iterator[TrunkHere]:
    with serve_here(files, tokens=tokens, open_s=OPEN_S) as running:
        yield running


def answered(address: str, files: ModelFiles, shown: Credentials = SEEN) -> torch.Tensor:
    """What a session is answered."""
    with Raw(address, shown) as raw:
        raw.ask(opening(files))
        return tensor_of(raw.ask(step(hidden(files, 3), 0)), files)


def healthy(address: str) -> bool:
    """Whether a health check without a token is answered."""
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return bool(check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING)


class Held:
    """Calls of one method on one connection, whose first message never comes."""

    def __init__(self, address: str, method: str, calls: int, shown: Credentials = NONE) -> None:
        self._over = threading.Event()
        self._channel = open_channel(address, shown)
        called: Any = self._channel.stream_stream(method)
        self.calls = [called(self._nothing(), timeout=600) for _ in range(calls)]

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._channel.close()

    def _nothing(self) -> Iterator[bytes]:
        self._over.wait()
        yield from ()

    def ended(self) -> list[grpc.StatusCode]:
        """The codes of those that the server has ended."""
        return [call.code() for call in self.calls if call.done()]


@pytest.mark.parametrize("method", [HEALTH, DESCRIBE, SESSION, REFLECTION, "/no.Such/Method"])
def test_calls_of_a_stranger_whose_message_never_comes_keep_nobody_out(
    method: str, patient: TrunkHere, files: ModelFiles
) -> None:
    greeting = PREFACE + frame(SETTINGS, 0, 0)
    wanted = answered(patient.address, files)
    with connected(patient.address, greeting) as connection:
        connection.sendall(b"".join(begun(1 + 2 * number, method) for number in range(CALLS)))
        for _ in range(3):
            assert healthy(patient.address)
            assert describe(patient.address, SEEN).hidden_size == 48
            assert torch.equal(answered(patient.address, files), wanted)


def test_health_is_answered_beside_many_connections_that_ask_for_it_and_send_no_message(
    patient: TrunkHere, files: ModelFiles
) -> None:
    with ExitStack() as stack:
        for _ in range(2 * connections.HEALTH_THREADS):
            stack.enter_context(connected(patient.address, PREFACE + frame(SETTINGS, 0, 0) + begun(1, HEALTH)))
        assert healthy(patient.address)
        assert describe(patient.address, SEEN).hidden_size == 48


@pytest.mark.parametrize("method", [DESCRIBE, f"/{SERVICE}/Drop", REFLECTION, SESSION])
def test_one_token_has_so_many_calls_and_the_others_are_refused_at_once(
    method: str, patient: TrunkHere, files: ModelFiles
) -> None:
    limit = 3 + gate.EXTRA_CALLS
    with Held(patient.address, method, CALLS, SEEN) as held:
        refused = CALLS - min(limit, 3 if method == SESSION else limit)
        assert eventually(lambda: len(held.ended()) == refused)
        assert set(held.ended()) == {FULL}
        assert healthy(patient.address)
        assert describe(patient.address, OTHER).hidden_size == 48
        assert answered(patient.address, files, OTHER).isfinite().all()


def test_without_tokens_too_a_session_that_says_nothing_gives_its_place_to_one_that_does(files: ModelFiles) -> None:
    with serve_here(files, open_s=600.0, max_sessions=2, max_waiting=1) as here:
        places = 2 * 2 + 1 + endpoint.SPARE_THREADS
        with Held(here.address, SESSION, places) as first, Held(here.address, SESSION, places):
            assert eventually(lambda: len(first.ended()) == places)
            assert set(first.ended()) == {LATE}
            assert answered(here.address, files, NONE).isfinite().all()
            assert healthy(here.address)


@pytest.mark.parametrize(
    "method", [HEALTH, DESCRIBE, f"/{SERVICE}/Metrics", f"/{SERVICE}/Drop", f"/{SERVICE}/Session", REFLECTION]
)
def test_every_method_waits_for_its_first_message_only_so_long(method: str, brisk: TrunkHere) -> None:
    with Held(brisk.address, method, 1, SEEN) as held:
        (call,) = held.calls
        assert call.code() is LATE
        assert call.details() == f"the client was silent for {OPEN_S} s (server.open_s)"


def test_reflection_waits_for_further_messages_no_longer(brisk: TrunkHere) -> None:
    over = threading.Event()

    def say() -> Iterator[bytes]:
        yield reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        over.wait(60)

    with open_channel(brisk.address, SEEN) as channel:
        called: Any = channel.stream_stream(REFLECTION)
        call = called(say(), timeout=60)
        assert next(call)
        assert call.code() is LATE
        over.set()


@pytest.mark.parametrize(
    "greeting",
    [b"", PREFACE[:10], PREFACE, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
    ids=["nothing", "half a greeting", "a greeting without settings", "a TLS greeting"],
)
def test_a_connection_that_does_not_greet_is_shut(greeting: bytes, brisk: TrunkHere) -> None:
    with connected(brisk.address, greeting) as connection:
        assert closed(connection, 60)


def test_a_tls_handshake_that_is_never_finished_is_shut(files: ModelFiles, tmp_path: Path) -> None:
    issued = Authority(tmp_path, "ours").issue("127.0.0.1")
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    with serve_here(files, tls=issued.settings(), open_s=OPEN_S) as here:
        for greeting in (b"", hello):
            with connected(here.address, greeting) as connection:
                assert closed(connection, 60)


def test_a_connection_with_half_a_call_is_shut(files: ModelFiles, tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a header block, and a call whose client does not take the answer."""
    half = PREFACE + frame(SETTINGS, 0, 0) + frame(floods.HEADERS, 0, 1, floods.fields(HEALTH))
    no_window = frame(SETTINGS, 0, 0, b"\0\x04\0\0\0\0")
    asked = begun(1, HEALTH) + frame(floods.DATA, floods.END_STREAM, 1, bytes(5))
    with changed(monkeypatch, files, tokens, QUIET_MS=1000, open_s=OPEN_S) as here:
        for greeting in (half, PREFACE + no_window + asked):
            with connected(here.address, greeting) as connection:
                assert closed(connection, 60)


@contextmanager
def changed(
    monkeypatch: pytest.MonkeyPatch, files: ModelFiles, tokens: str, open_s: float = 10.0, **named: int
) -> Iterator[TrunkHere]:
    """A server with other limits on connections."""
    for name, value in named.items():
        monkeypatch.setattr(endpoint if hasattr(endpoint, name) else connections, name, value)
    with serve_here(files, tokens=tokens, open_s=open_s) as here:
        yield here


def test_a_connection_without_calls_is_shut_and_its_client_connects_again(
    files: ModelFiles, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with changed(monkeypatch, files, tokens, QUIET_MS=1000) as here, open_channel(here.address, SEEN) as channel:
        called: Any = channel.unary_unary(DESCRIBE)
        called(b"", timeout=20)
        with connected(here.address) as connection:
            assert closed(connection, 60)
        assert called(b"", timeout=20)


def test_there_are_so_many_connections_and_those_that_are_there_go_on(
    files: ModelFiles, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with changed(monkeypatch, files, tokens, MAX_CONNECTIONS=10) as here, Raw(here.address, SEEN) as raw:
        raw.ask(opening(files))
        with ExitStack() as stack:
            held = [stack.enter_context(connected(here.address)) for _ in range(30)]
            assert eventually(lambda: sum(closed(each, 0.02) for each in held) >= 21)
            assert raw.ask(step(hidden(files, 3), 0)).HasField("result")


def denied(address: str, calls: int) -> Sequence[grpc.StatusCode]:
    """The codes of so many calls without a token."""
    with Held(address, DESCRIBE, calls) as held:
        return [call.code() for call in held.calls]


def test_denied_calls_are_all_counted_take_no_thread_and_write_few_lines(
    patient: TrunkHere, caplog: pytest.LogCaptureFixture
) -> None:
    def count() -> float:
        text = patient.runtime.metrics.text()
        (line,) = [
            each
            for each in text.splitlines()
            if each.startswith("splitlearn_trunk_refusals_total{") and "denied" in each
        ]
        return float(line.rpartition(" ")[2])

    describe(patient.address, SEEN)
    before, caplog_from = count(), len(caplog.records)
    with caplog.at_level("INFO", logger="server"):
        codes = [code for _ in range(10) for code in denied(patient.address, 100)]
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
    assert count() - before == 1000
    said = [record for record in caplog.records[caplog_from:] if record.msg == "refused"]
    seconds = {int(record.created) for record in said}
    assert len(said) <= logs.MAX_REFUSALS_PER_S * (len(seconds) + 1)
    written: list[Any] = [vars(record)["fields"] for record in said]
    assert len(said) + sum(fields.get("left_out", 0) for fields in written) <= 1000


@pytest.mark.parametrize("name", FLOODS)
def test_beside_a_flood_a_client_gets_its_exact_answers(
    name: str, patient: TrunkHere, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "CONNECTIONS", 50)
    over, wanted = threading.Event(), answered(patient.address, files)
    flooding = threading.Thread(target=FLOODS[name], args=(patient.address, over))
    with Raw(patient.address, SEEN) as raw:
        raw.ask(opening(files))
        flooding.start()
        try:
            for number in range(1, 20):
                reply = raw.ask(step(hidden(files, 3), 0, number, truncate=number > 1))
                assert torch.equal(tensor_of(reply, files), wanted)
            assert describe(patient.address, SEEN).hidden_size == 48
        finally:
            over.set()
            flooding.join()
