"""TLS and mutual TLS, with real certificates: who is let in, and that nobody else learns anything."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from server.auth.tls import Security
from splitlearn import config
from splitlearn.access import tokens
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.served import describe
from splitlearn.errors import InputError, TrunkUnavailable
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent
from splitlearn.wire import channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.stub import TrunkStub
from tests.conftest import TinyFactory
from tests.support.pki import Authority, CertificatePair
from tests.support.trunk import TrunkHere, hidden, serve, serve_here, served, settings
from tests.support.words import session_of

CACHED = frozenset({"use_cache"})
SERVER, CLIENT = ("127.0.0.1", "localhost"), "client@example.org"


@dataclass(frozen=True)
class Pki:
    ours: Authority
    other: Authority
    server: CertificatePair
    client: CertificatePair


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    ours, other = Authority(folder, "ours"), Authority(folder, "other")
    return Pki(ours, other, ours.issue(*SERVER), ours.issue(CLIENT))


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tls(files: ModelFiles, pki: Pki) -> Iterator[TrunkHere]:
    with serve_here(files, tls=pki.server.settings()) as here:
        yield here


@pytest.fixture(scope="module")
def mutual(files: ModelFiles, pki: Pki) -> Iterator[TrunkHere]:
    with serve_here(files, tls={**pki.server.settings(), "client_ca": str(pki.ours.certificate)}) as here:
        yield here


def test_a_session_over_tls_is_answered(tls: TrunkHere, pki: Pki, files: ModelFiles) -> None:
    stage = RemoteStage([tls.address], served(files), 20, pki.ours.credentials())
    session = stage.open(session_of(frozenset({"use_cache"})), 8)
    assert session.step(0, hidden(files, 3)).x.shape == (1, 3, 48)
    session.close()
    stage.close()


def test_a_client_with_a_certificate_of_the_authority_is_let_in(mutual: TrunkHere, pki: Pki) -> None:
    assert describe(mutual.address, pki.ours.credentials(pki.client)).hidden_size == 48


def test_a_certificate_has_to_name_the_trunk_and_not_the_link_before_it(pki: Pki, files: ModelFiles) -> None:
    named = pki.ours.issue("trunk.test")
    with serve_here(files, tls=named.settings()) as here:
        with open_channel("trunk.test:50051", pki.ours.credentials(), here.address) as channel:
            assert TrunkStub(channel).describe(pb.DescribeRequest(), timeout=20).hidden_size == 48
        with (
            open_channel("other.test:50051", pki.ours.credentials(), here.address) as channel,
            pytest.raises(grpc.RpcError, match="Hostname Verification"),
        ):
            TrunkStub(channel).describe(pb.DescribeRequest(), timeout=20)


REFUSED: dict[str, tuple[str, Callable[[Pki], Credentials], str]] = {
    "plaintext": ("tls", lambda pki: NONE, "set trunk.tls"),
    "another authority": ("tls", lambda pki: pki.other.credentials(), "CERTIFICATE_VERIFY_FAILED"),
    "no certificate": ("mutual", lambda pki: pki.ours.credentials(), "set trunk.tls"),
    "expired certificate": (
        "mutual",
        lambda pki: pki.ours.credentials(pki.ours.issue(CLIENT, expired=True)),
        "set trunk.tls",
    ),
    "another authority's certificate": (
        "mutual",
        lambda pki: pki.ours.credentials(pki.other.issue(CLIENT)),
        "set trunk.tls",
    ),
    "plaintext at mutual": ("mutual", lambda pki: NONE, "set trunk.tls"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_shows_something_else_is_refused_and_told_what_to_set(
    case: str, pki: Pki, files: ModelFiles, request: pytest.FixtureRequest
) -> None:
    server, shown, words = REFUSED[case]
    address = request.getfixturevalue(server).address
    with pytest.raises(TrunkUnavailable, match=words) as caught:
        describe(address, shown(pki))
    assert files.name not in str(caught.value)
    with pytest.raises(TrunkUnavailable, match=words):
        RemoteStage([address], served(files), 20, shown(pki)).open(session_of(frozenset()), 8)


@pytest.mark.parametrize("said", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(1000)])
def test_a_tls_port_says_nothing_to_plaintext(said: bytes, tls: TrunkHere) -> None:
    host, _, port = tls.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(said)
        heard = b""
        while part := connection.recv(4096):
            heard += part
    assert heard == b"" or heard[0] == 21, "at most a TLS alert"


def test_a_server_whose_certificate_has_expired_is_not_trusted(files: ModelFiles, pki: Pki) -> None:
    expired = pki.ours.issue(*SERVER, expired=True).settings()
    words = r"certificate has expired.*Look at trunk\.tls"
    with serve_here(files, tls=expired) as here, pytest.raises(TrunkUnavailable, match=words):
        describe(here.address, pki.ours.credentials())


def test_tls_to_a_plaintext_port_is_refused_by_the_client(files: ModelFiles, pki: Pki) -> None:
    with serve_here(files) as here, pytest.raises(TrunkUnavailable, match=r"Look at trunk\.tls"):
        describe(here.address, pki.ours.credentials())


def test_the_name_in_the_certificate_counts_unless_another_is_expected(files: ModelFiles, pki: Pki) -> None:
    with serve_here(files, tls=pki.ours.issue("trunk.example.org").settings()) as here:
        with pytest.raises(TrunkUnavailable, match=r"[Vv]erification.*Look at trunk\.tls"):
            describe(here.address, pki.ours.credentials())
        tls = {"ca": str(pki.ours.certificate), "server_name": "trunk.example.org"}
        trunk = config.parse({"trunk": {"address": here.address, "tls": tls}}).trunk
        assert describe(here.address, channel.credentials(trunk)).hidden_size == 48


WRONG: dict[str, tuple[Callable[[Pki, Path], dict[str, str]], str]] = {
    "no such file": (
        lambda pki, none: {**pki.server.settings(), "certificate": str(none)},
        r"tls\.certificate.*readable",
    ),
    "another's key": (
        lambda pki, none: {**pki.server.settings(), "key": str(pki.client.key)},
        r"tls\.key.*key of the PEM",
    ),
    "no key": (lambda pki, none: {"certificate": str(pki.server.certificate)}, "certificate and key together"),
    "swapped": (
        lambda pki, none: {"certificate": str(pki.server.key), "key": str(pki.server.certificate)},
        r"tls\.key.*private key",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_are_named_at_both_ends_before_anything_starts(
    case: str, pki: Pki, tmp_path: Path
) -> None:
    made, words = WRONG[case]
    tls = made(pki, tmp_path / "none.pem")
    with pytest.raises(InputError, match=f"server.*{words}"):
        Security.of(config.parse({"server": {"tls": tls}}).server)
    with pytest.raises(InputError, match=f"trunk.*{words}"):
        channel.credentials(config.parse({"trunk": {"tls": {**tls, "ca": str(pki.ours.certificate)}}}).trunk)


def test_an_authority_that_is_no_certificate_is_named(pki: Pki) -> None:
    key = str(pki.server.key)
    with pytest.raises(InputError, match=r"server\.tls\.client_ca.*certificates"):
        Security.of(config.parse({"server": {"tls": {**pki.server.settings(), "client_ca": key}}}).server)
    with pytest.raises(InputError, match=r"trunk\.tls\.ca.*certificates"):
        channel.credentials(config.parse({"trunk": {"tls": {"ca": key}}}).trunk)


def test_what_is_secret_is_in_no_representation(pki: Pki) -> None:
    shown = pki.ours.credentials(pki.client, token="the-secret")
    assert "the-secret" not in repr(shown)
    assert "PRIVATE KEY" not in repr(shown)


def test_a_whole_generation_goes_over_mutual_tls_with_a_token(
    pki: Pki, files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through everything that a person uses: settings, a worker process, a server process."""
    secret, entry = tokens.make("ann")
    (tmp_path / "tokens.yaml").write_text(entry)
    monkeypatch.setenv("SPLITLEARN_TRUNK_TOKEN", secret)
    authority = str(pki.ours.certificate)
    server = {"tls": {**pki.server.settings(), "client_ca": authority}, "tokens": str(tmp_path / "tokens.yaml")}
    with serve(settings(files, server=server), tmp_path) as running:
        trunk = {"address": running.address, "tls": {**pki.client.settings(), "ca": authority}}
        with Runs(config.parse(settings(files, trunk=trunk)), silent) as runs:
            runs.check_trunk()
            assert "use_cache" in runs.availability()["trunk"]
            flags = FlagSet(CACHED, CACHED, CACHED)
            request = GenerationRequest("Hello", max_new_tokens=8, ignore_eos=True)
            events = [event for event in runs.stream("split", flags, request) if isinstance(event, TokenEvent)]
        assert "Traceback" not in running.errors.read_text()
    assert len(events) == 8
