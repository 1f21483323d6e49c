"""Servers for other sets of flags: for whom there are any, what they cost the one that starts them, how they end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch

from server import memory
from server.memory import KV_SHARE, Memory
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import describe
from splitlearn.errors import InputError, TrunkFull
from tests.conftest import TinyFactory
from tests.support.trunk import Raw, eventually, forks_of, gone, hidden, opening, serve, serve_here, settings, step

REFUSED, FULL = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED
OTHER = ["use_cache", "low_cpu_mem_usage"]
START_S = 240.0


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@contextmanager
def none_started() -> Iterator[None]:
    """No process is started meanwhile."""
    before = set(forks_of())
    yield
    assert set(forks_of()) <= before


def refusal(address: str, files: ModelFiles, flags: list[str], timeout_s: float = 60) -> tuple[grpc.StatusCode, str]:
    """How a session with these flags is refused."""
    with Raw(address) as raw:
        return raw.refusal(opening(files, flags=flags, timeout_s=timeout_s))


def test_strangers_are_given_none_and_are_told_before_they_ask(files: ModelFiles) -> None:
    with none_started(), serve_here(files, host="0.0.0.0", allow_open=True) as here:
        address = here.address.replace("0.0.0.0", "127.0.0.1")
        code, said = refusal(address, files, OTHER)
        unavailable = {flag.name: flag.unavailable for flag in describe(address).flags}
    assert code is REFUSED
    assert "set server.tokens or server.tls.client_ca" in said
    assert "strangers" in unavailable["low_cpu_mem_usage"]
    assert unavailable["use_cache"] == ""


@pytest.mark.parametrize(
    ("offered", "flag"), [(None, "torch_compile"), (["output_attentions"], "low_cpu_mem_usage"), ([], "weight_prepack")]
)
def test_a_flag_that_is_not_on_offer_is_refused_by_name(
    offered: list[str] | None, flag: str, files: ModelFiles
) -> None:
    with none_started(), serve_here(files, offered_flags=offered) as here:
        code, said = refusal(here.address, files, ["use_cache", flag])
        unavailable = {each.name: each.unavailable for each in describe(here.address).flags}
    assert code is REFUSED
    assert "server.offered_flags" in said
    assert flag in said
    assert "server.offered_flags" in unavailable[flag]


@pytest.mark.parametrize("name", ["use_cache", "no_such_flag"])
def test_what_cannot_be_on_offer_is_named(name: str, files: ModelFiles) -> None:
    with pytest.raises(InputError, match=rf"server\.offered_flags: '{name}'"), serve_here(files, offered_flags=[name]):
        pass


def test_without_memory_none_is_started(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with none_started(), serve_here(files) as here:
        monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 20)
        code, said = refusal(here.address, files, OTHER)
        with Raw(here.address) as raw:
            assert raw.ask(opening(files)).HasField("opened")
    assert code is FULL
    assert "no memory for a server with these flags" in said
    assert "1 MiB are free" not in said, "what the own KV memory may come to take is not free"


def test_what_another_may_take_is_what_all_before_it_have_left(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1 << 20
    with serve_here(files, "trunk:none", {"memory_bytes": 0}, kv_bytes=64 * mib) as here:
        monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 300 * mib)
        own, pool = Memory(here.runtime), here.runtime.admission.pool.nbytes
        monkeypatch.setattr(memory, "free_bytes", lambda _: pool + 300 * mib + 40 * mib)
        assert own.take("first") == int(KV_SHARE * 40 * mib)
        with pytest.raises(TrunkFull, match="it takes 300 MiB, and 20 MiB are free"):
            own.take("second")
        own.loaded("first")  # its copy is in memory now, and what is free is less by that
        monkeypatch.setattr(memory, "free_bytes", lambda _: pool + 330 * mib)
        assert own.take("second") == int(KV_SHARE * (330 - 20 - 300) * mib)
        own.give_back("first")
        own.give_back("second")
        monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 40)
        assert own.take("third") == pool, "no more than this server has itself"


def test_prefixes_that_this_server_and_another_may_come_to_keep_are_not_free(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1 << 20
    with serve_here(files, "trunk:none", {"memory_bytes": 50 * mib}, kv_bytes=64 * mib) as here:
        monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 300 * mib)
        own, pool, store = Memory(here.runtime), here.runtime.admission.pool.nbytes, here.runtime.prefixes.store
        monkeypatch.setattr(memory, "free_bytes", lambda _: pool + (50 + 350 + 40) * mib)
        assert own.take("first") == int(KV_SHARE * 40 * mib)
        own.give_back("first")
        store.put([b"key"], 0, [((torch.zeros(10 * mib, dtype=torch.uint8),),)])
        monkeypatch.setattr(memory, "free_bytes", lambda _: pool + (40 + 350 + 40) * mib)
        assert own.take("second") == int(KV_SHARE * 40 * mib)


def test_a_start_that_hangs_is_ended_when_its_last_client_gives_up_and_holds_up_nobody(files: ModelFiles) -> None:
    before, late = set(forks_of()), (FULL, "the server for these flags did not start in time")
    with serve_here(files) as here:
        with Raw(here.address) as waiting:
            waiting.send(opening(files, flags=OTHER, timeout_s=START_S))
            assert eventually(lambda: set(forks_of()) - before, START_S)
            (child,) = set(forks_of()) - before
            child.suspend()
            assert refusal(here.address, files, OTHER, timeout_s=0.2) == late
            assert "sessions_proxied 1" in here.runtime.metrics.text()
            with Raw(here.address) as raw:
                raw.ask(opening(files))
                assert raw.ask(step(hidden(files, 3), 0)).HasField("result")
        assert eventually(lambda: gone(child.pid), START_S)
        assert eventually(lambda: here.runtime.admission.sessions == 0, START_S)
        assert refusal(here.address, files, OTHER, timeout_s=0.01) == late  # no process starts as quickly
        assert eventually(lambda: set(forks_of()) <= before, START_S)


def test_a_session_elsewhere_counts_and_its_server_goes_when_nobody_needs_it(files: ModelFiles) -> None:
    before = set(forks_of())
    with serve_here(files, max_sessions=1, max_waiting=0, idle_s=5.0) as here:
        with Raw(here.address) as raw:
            raw.send(opening(files, flags=OTHER, timeout_s=START_S))
            assert eventually(lambda: set(forks_of()) - before, START_S)
            code, said = refusal(here.address, files, ["use_cache", "inference_mode"])
            assert (code, "1 of 1 sessions" in said) == (FULL, True), "one that starts counts, too"
            assert raw.receive().HasField("opened")
            assert raw.ask(step(hidden(files, 3), 0)).HasField("result")
            code, said = refusal(here.address, files, ["use_cache", "inference_mode"])
            assert (code, "1 of 1 sessions" in said) == (FULL, True)
        assert eventually(lambda: here.runtime.admission.sessions == 0, START_S)
        assert eventually(lambda: set(forks_of()) <= before, START_S)


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_start(files: ModelFiles, tmp_path: Path) -> None:
    config = settings(files, server={"drain_s": 1.0})
    with serve(config, tmp_path) as own, Raw(own.address) as raw:
        raw.send(opening(files, flags=OTHER, timeout_s=START_S))
        assert eventually(own.variants, START_S)
        (child,) = own.variants()
        child.suspend()  # it would start for as long as it likes
        for _ in range(3):
            own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(60) == 0
        assert eventually(lambda: gone(child.pid), START_S)
