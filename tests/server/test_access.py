"""Tokens: who is let in, how much each may use, and what those learn who are not."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2

from server import __main__ as server_main
from server.auth.gate import Access
from server.auth.tls import Security
from splitlearn import config
from splitlearn.access import tokens as token_file
from splitlearn.access.quota import DENIED
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.served import describe
from splitlearn.errors import InputError, SetupError, TrunkDenied, TrunkFull
from splitlearn.wire import SERVICE, channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import Credentials, open_channel
from splitlearn.wire.status import error_of
from tests.conftest import TinyFactory
from tests.support.tokens import ANN, BOB, entry, written
from tests.support.trunk import Raw, TrunkHere, eventually, forks_of, hidden, opening, serve_here, served, step
from tests.support.words import session_of

EVE, SLOW = "secret-of-eve", "secret-of-slow"
CACHED = frozenset({"use_cache", "inference_mode"})
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def here(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkHere]:
    tokens = written(
        tmp_path_factory.mktemp("tokens"),
        entry("ann", ANN, sessions=1),
        entry("bob", BOB, expires=NOW + timedelta(days=1)),
        entry("eve", EVE, expires=NOW - timedelta(seconds=1)),
        entry("slow", SLOW, tokens_per_second=20.0),
    )
    with serve_here(files, tokens=str(tokens)) as running:
        yield running


METHODS = (
    f"/{SERVICE}/Session",
    f"/{SERVICE}/Describe",
    f"/{SERVICE}/Metrics",
    f"/{SERVICE}/NoSuchMethod",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def call(address: str, method: str, *metadata: tuple[str, str | bytes]) -> Any:
    """What one empty message to any method is answered: the answer, or the error."""
    with open_channel(address) as opened:
        asked: Any = opened.stream_stream(method)
        try:
            return next(asked(iter([b""]), metadata=metadata, timeout=20))
        except grpc.RpcError as error:
            return error


SHOWN: dict[str, list[tuple[str, str | bytes]]] = {
    "nothing": [],
    "an empty header": [("authorization", "")],
    "a wrong token": [("authorization", "Bearer secret-of-nobody")],
    "a part of a token": [("authorization", f"Bearer {ANN[:-1]}")],
    "more than a token": [("authorization", f"Bearer {ANN}x")],
    "its digest": [("authorization", f"Bearer {token_file.digest(ANN)}")],
    "an expired token": [("authorization", f"Bearer {EVE}")],
    "another scheme": [("authorization", f"Basic {ANN}")],
    "no scheme": [("authorization", ANN)],
    "another header": [("x-authorization", f"Bearer {ANN}")],
    "two tokens": [("authorization", f"Bearer {EVE}"), ("authorization", f"Bearer {ANN}")],
}


@pytest.mark.parametrize("shown", SHOWN)
def test_without_a_valid_token_every_method_gives_the_same_answer(shown: str, here: TrunkHere) -> None:
    answers = [call(here.address, method, *SHOWN[shown]) for method in METHODS]
    assert {(error.code(), error.details()) for error in answers} == {(grpc.StatusCode.UNAUTHENTICATED, DENIED)}
    assert here.runtime.admission.sessions == 0


def test_the_health_check_needs_no_token(here: TrunkHere) -> None:
    said = call(here.address, "/grpc.health.v1.Health/Check")
    assert health_pb2.HealthCheckResponse.FromString(said).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("secret", [ANN, BOB])
def test_with_a_valid_token_the_trunk_answers(secret: str, here: TrunkHere) -> None:
    assert describe(here.address, Credentials(token=secret)).hidden_size == 48


def test_the_scheme_may_be_written_in_any_case(here: TrunkHere) -> None:
    said = call(here.address, f"/{SERVICE}/Describe", ("authorization", f"bearer {ANN}"))
    assert pb.Description.FromString(said).hidden_size == 48


def test_a_client_without_a_token_is_told_where_one_is_looked_for(here: TrunkHere, files: ModelFiles) -> None:
    with pytest.raises(TrunkDenied, match=r"UNAUTHENTICATED.*variable that trunk\.token names"):
        RemoteStage([here.address], served(files), 20).open(session_of(frozenset()), 8)


def test_a_token_has_so_many_sessions_and_no_more_and_others_are_not_touched(
    here: TrunkHere, files: ModelFiles
) -> None:
    ann = RemoteStage([here.address], served(files), 2, Credentials(token=ANN))
    bob = RemoteStage([here.address], served(files), 20, Credentials(token=BOB))
    first = ann.open(session_of(frozenset()), 8)
    with pytest.raises(TrunkFull, match="all 1 sessions of this client"):
        ann.open(session_of(frozenset()), 8)
    bob.open(session_of(frozenset()), 8).close()
    first.close()
    assert eventually(lambda: here.runtime.admission.sessions == 0)
    ann.open(session_of(frozenset()), 8).close()
    ann.close()
    bob.close()


def test_a_session_over_its_rate_waits_and_its_ledger_says_so(files: ModelFiles, here: TrunkHere) -> None:
    stage = RemoteStage([here.address], served(files), 20, Credentials(token=SLOW))
    session = stage.open(session_of(CACHED), 64)
    session.step(0, hidden(files, 20))
    assert session.step(20, hidden(files, 40)).timing.ledger["queue"] > 0.1  # 40 at 20 a second
    session.close()
    stage.close()


def test_what_its_client_would_not_wait_for_is_refused_with_the_time_to_try_again(
    files: ModelFiles, here: TrunkHere
) -> None:
    with Raw(here.address, Credentials(token=SLOW)) as raw:
        raw.ask(opening(files, timeout_s=0.5))
        raw.send(step(hidden(files, 60), 0))
        with pytest.raises(grpc.RpcError) as caught:
            raw.receive()
    error = error_of(caught.value, here.address)
    assert isinstance(error, TrunkFull)
    assert "20 a second" in str(error)
    assert 1.5 < error.retry_s < 4


def test_a_server_for_other_flags_asks_for_the_token_as_well(files: ModelFiles, here: TrunkHere) -> None:
    before = set(forks_of())
    stage = RemoteStage([here.address], served(files), 60, Credentials(token=BOB))
    stage.open(session_of(CACHED | {"low_cpu_mem_usage"}), 8).close()
    stage.close()
    (child,) = set(forks_of()) - before
    (port,) = {found.laddr.port for found in child.net_connections() if found.status == psutil.CONN_LISTEN}
    with pytest.raises(TrunkDenied):
        describe(f"127.0.0.1:{port}")


class Call:
    """What `Access.quota` looks at of a call; `end` is what gRPC does when the call is over."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self.callbacks: list[Callable[[], None]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self._secret}")]

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callbacks.append(callback)
        return True


def entered(access: Access, secret: str) -> tuple[Any, Call]:
    made: Any = Call(secret)
    return access.quota(made), made


def test_a_session_over_its_rate_is_slowed_down_until_its_call_ends() -> None:
    token = token_file.Token.model_validate(entry("slow", ANN, tokens_per_second=10.0))
    guest, made = entered(Access([token]), ANN)
    assert guest.spend(10, 60) == 0
    started = time.monotonic()
    assert guest.spend(1, 60) == pytest.approx(0.1, rel=0.5)
    assert time.monotonic() - started >= 0.05
    for callback in made.callbacks:
        callback()
    started = time.monotonic()
    guest.spend(300, 60)
    assert time.monotonic() - started < 15, "a call that has ended still waited"


def test_all_sessions_of_a_token_share_its_rate() -> None:
    token = token_file.Token.model_validate(entry("slow", ANN, tokens_per_second=10.0))
    access = Access([token])
    (one, _), (other, _) = entered(access, ANN), entered(access, ANN)
    assert one.spend(10, 60) == 0
    with pytest.raises(TrunkFull):
        other.spend(10, 0.5)


def test_a_token_that_expires_ends_its_sessions() -> None:
    token = token_file.Token.model_validate(entry("short", ANN, expires=datetime.now(UTC) + timedelta(seconds=0.3)))
    guest, _ = entered(Access([token]), ANN)
    guest.spend(1, 60)
    with pytest.raises(TrunkDenied, match=DENIED):
        while True:
            guest.spend(1, 60)
            time.sleep(0.05)


def test_without_tokens_everybody_is_let_in_without_limits() -> None:
    guest, _ = entered(Access(), "anything")
    assert guest.spend(1_000_000, 0.1) == 0


def test_the_command_prints_the_entry_for_the_file_and_the_secret_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert server_main.main(["token", "ann"]) == 0
    said = capsys.readouterr()
    (made,) = yaml.safe_load(said.out)
    secret = said.err.split()[-1]
    assert made["name"] == "ann"
    assert made["sha256"] == token_file.digest(secret)
    assert secret not in said.out


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "trunk.example.org"])
def test_a_server_does_not_listen_beyond_loopback_without_access_control(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_main.main(["--host", host]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    for way_out in ("server.tls", "server.tokens", "server.tls.client_ca", "127.0.0.1", "--allow-open"):
        assert way_out in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_access_control(host: str) -> None:
    assert Security.of(config.parse({"server": {"host": host}}).server).credentials is None


def test_an_open_door_must_be_asked_for_by_name() -> None:
    settings = {"host": "0.0.0.0", "allow_open": True}
    assert entered(Security.of(config.parse({"server": settings}).server).access, "anything")


def test_tokens_alone_do_not_guard_a_network_since_they_would_go_in_plaintext(tmp_path: Path) -> None:
    settings = {"host": "0.0.0.0", "tokens": str(written(tmp_path, entry("ann", ANN)))}
    with pytest.raises(SetupError, match=r"server\.tls is not set"):
        Security.of(config.parse({"server": settings}).server)


@pytest.mark.parametrize("address", ["trunk.example.org:50051", "192.168.1.5:50051", "127.0.0.1.example.org:1"])
def test_a_client_does_not_send_its_token_over_a_network_in_plaintext(address: str) -> None:
    with pytest.raises(InputError, match=r"trunk\.tls\.ca.*plaintext") as caught:
        open_channel(address, Credentials(token=ANN))
    assert ANN not in str(caught.value)


@pytest.mark.parametrize("held", ["two words", "a line\nmore", "ünicode"])
def test_a_variable_that_holds_no_token_is_named_and_not_shown(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITLEARN_TRUNK_TOKEN", held)
    with pytest.raises(InputError, match=r"trunk\.token.*SPLITLEARN_TRUNK_TOKEN") as caught:
        channel.credentials(config.Config().trunk)
    assert held not in str(caught.value)


def test_the_token_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", ANN)
    assert channel.credentials(config.parse({"trunk": {"token": "MY_TOKEN"}}).trunk).token == ANN
    assert channel.credentials(config.Config().trunk).token is None
