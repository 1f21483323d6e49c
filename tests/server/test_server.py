"""The trunk server as a process with a socket: what it refuses, what it survives, what it frees."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import server.__main__ as server_main
from server import connections
from server.endpoint import SPARE_THREADS
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import describe
from splitlearn.scheduling.admission import DRAINING
from splitlearn.wire import PROTOCOL, SERVICE
from splitlearn.wire import trunk_pb2 as pb
from tests.conftest import TinyFactory
from tests.support.forks import Fork
from tests.support.trunk import (
    PLAN,
    Raw,
    Trunk,
    TrunkHere,
    eventually,
    forks_of,
    gone,
    hidden,
    opening,
    serve,
    serve_here,
    settings,
    step,
    tensor_of,
)

SESSIONS, OTHERS = 3, 2
MAX_LENGTH = 64
MEGABYTE = 1 << 20
# A client that opens sessions and then does nothing; it has nothing in common with the client under test.
HOLD = f"""
import sys, time, grpc
def say():
    yield bytes.fromhex(sys.argv[2])
    time.sleep(600)
channel = grpc.insecure_channel(sys.argv[1])
calls = [channel.stream_stream("/{SERVICE}/Session")(say()) for _ in range(int(sys.argv[3]))]
for call in calls:
    next(call)
print("open", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def shared(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    config = settings(files, server={"max_sessions": SESSIONS, "max_waiting": 0, "max_variants": OTHERS})
    with serve(config, tmp_path_factory.mktemp("server"), fresh=True) as running:
        yield running


@pytest.fixture
def trunk(shared: Trunk, files: ModelFiles) -> Iterator[Trunk]:
    """The module's server; afterwards every session is free again, and it serves as before."""
    yield shared
    assert shared.process.poll() is None
    assert eventually(lambda: free_places(shared.address, files) == SESSIONS)
    assert answer(shared.address, files).shape == (1, 4, files.facts.hidden_size)
    assert "Traceback" not in shared.errors.read_text()


def free_places(address: str, files: ModelFiles) -> int:
    """How many sessions the server lets in now."""
    with ExitStack() as stack:
        for count in range(SESSIONS + 1):
            raw = stack.enter_context(Raw(address))
            raw.send(opening(files))
            try:
                raw.receive()
            except grpc.RpcError:
                return count
    return SESSIONS + 1


def answer(address: str, files: ModelFiles, **opened: Any) -> torch.Tensor:
    """What a session of a step of 3 tokens and a step of 1 answers, [1, 4, H]."""
    x = hidden(files, 4)
    with Raw(address) as raw:
        raw.ask(opening(files, **opened))
        outs = [raw.ask(step(x[:, :3], 0, 1)), raw.ask(step(x[:, 3:], 3, 2))]
        assert raw.end().closed.peak_rss_bytes > 50 * MEGABYTE
    return torch.cat([tensor_of(out, files) for out in outs], dim=1)


@contextmanager
def session(trunk: Trunk | TrunkHere, files: ModelFiles, **opened: Any) -> Iterator[Raw]:
    """An open session."""
    with Raw(trunk.address) as raw:
        assert raw.ask(opening(files, **opened)).opened.threads == 1
        yield raw


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model": "other", "digest": "0"}, "FAILED_PRECONDITION", ["model is {name}, not 'other'", "digest is"]),
        ({"model": "x" * 50_000, "digest": "0"}, "FAILED_PRECONDITION", ["model is {name}, not 'xxx"]),
        ({"model": "\n\0ü🙂", "digest": "0"}, "FAILED_PRECONDITION", ["model is {name}"]),
        ({"digest": "0" * 64}, "FAILED_PRECONDITION", ["digest is {digest}, not '0000"]),
        ({"start": 1}, "FAILED_PRECONDITION", ["layer range is (2, 4, 6), not (1, 4, 6)"]),
        ({"end": 5}, "FAILED_PRECONDITION", ["layer range is (2, 4, 6), not (2, 5, 6)"]),
        ({"n_layers": 7}, "FAILED_PRECONDITION", ["layer range is (2, 4, 6), not (2, 4, 7)"]),
        ({"dtype": "bfloat16"}, "FAILED_PRECONDITION", ["dtype is float32, not 'bfloat16'"]),
        ({"protocol": 99}, "FAILED_PRECONDITION", [f"protocol is {PROTOCOL}, not 99"]),
        ({"digest": "a", "dtype": "b", "end": 3}, "FAILED_PRECONDITION", ["digest is", "dtype is", "layer range is"]),
        ({"flags": ["no_such"]}, "INVALID_ARGUMENT", ["'no_such'", "use_cache"]),
        ({"flags": ["output_attentions=maybe"]}, "INVALID_ARGUMENT", ["'maybe'", "off, on"]),
        ({"flags": ["use_cache", "use_cache=off"]}, "INVALID_ARGUMENT", ["one choice of use_cache"]),
        ({"flags": ["use_cache="]}, "INVALID_ARGUMENT", ["flags: use_cache", "off, on"]),
        ({"flags": ["cudnn_benchmark"]}, "FAILED_PRECONDITION", ["cudnn_benchmark", "needs a CUDA device"]),
        ({"flags": ["use_fast"]}, "FAILED_PRECONDITION", ["use_fast", "does not act on this side"]),
        ({"max_length": 0}, "INVALID_ARGUMENT", ["max_length: 0", "1 to 512 tokens"]),
        ({"max_length": 513}, "INVALID_ARGUMENT", ["max_length: 513", "1 to 512 tokens"]),
        ({"max_length": 2**32 - 1}, "INVALID_ARGUMENT", ["1 to 512 tokens"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_open_that_does_not_match_is_refused_with_what_would_be_right(
    changes: dict[str, Any], code: str, words: list[str], trunk: Trunk, files: ModelFiles
) -> None:
    with Raw(trunk.address) as raw:
        status, details = raw.refusal(opening(files, **changes))
    assert status.name == code
    for word in words:
        assert word.format(name=files.name, digest=files.digest) in details


def test_garbage_as_the_first_message_is_refused(trunk: Trunk, files: ModelFiles) -> None:
    unnamed = pb.ClientMessage().SerializeToString()
    for garbage in (b"\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), unnamed, step(hidden(files, 1), 0)):
        with Raw(trunk.address) as raw:
            status, details = raw.refusal(garbage)
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "ClientMessage" in details or "of kind 'open'" in details


def test_a_message_over_the_limit_is_refused(trunk: Trunk, files: ModelFiles) -> None:
    with session(trunk, files) as raw:
        status, details = raw.refusal(bytes(5_000_000))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details


def raw_tensor(shape: tuple[int, ...], data: bytes, dtype: pb.Dtype = pb.FLOAT32) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


LATER: dict[str, tuple[Callable[[ModelFiles], list[bytes]], list[str]]] = {
    "garbage": (lambda files: [b"\xff\xff\xff"], ["a serialized splitlearn.v1.ClientMessage"]),
    "empty": (lambda files: [b""], ["one of kind 'step'"]),
    "second open": (lambda files: [opening(files)], ["'open'", "one of kind 'step'"]),
    "no tensor": (lambda files: [step(pb.Tensor(), 0)], ["tensor.dtype", "float32"]),
    "dtype": (lambda files: [step(hidden(files, 1).half(), 0)], ["tensor.dtype: 'float16'", "float32"]),
    "unknown dtype": (lambda files: [step(raw_tensor((1, 1, 48), bytes(192), 77), 0)], ["'77'"]),  # type: ignore[arg-type]
    "shape": (lambda files: [step(torch.zeros(1, 2, 47), 0)], ["tensor.shape: [1, 2, 47]", "[1, tokens, 48]"]),
    "batch": (lambda files: [step(raw_tensor((2, 1, 48), bytes(384)), 0)], ["[2, 1, 48]"]),
    "rank": (lambda files: [step(raw_tensor((48,), bytes(192)), 0)], ["[48]"]),
    "no tokens": (lambda files: [step(raw_tensor((1, 0, 48), b""), 0)], ["at least one token"]),
    "too little data": (lambda files: [step(raw_tensor((1, 2, 48), bytes(383)), 0)], ["383 bytes", "384 bytes"]),
    "too much data": (lambda files: [step(raw_tensor((1, 2, 48), bytes(385)), 0)], ["385 bytes", "384 bytes"]),
    "huge shape": (lambda files: [step(raw_tensor((1, 2**32 - 1, 48), b""), 0)], ["'0 bytes'"]),
    "gap": (lambda files: [step(hidden(files, 1), 1)], ["position: 1", "from 0 to 0", "cached length"]),
    "huge position": (lambda files: [step(hidden(files, 1), 2**32 - 1)], ["position", "at most 64 tokens"]),
    "too many": (lambda files: [step(hidden(files, 65), 0)], ["at most 64 tokens in all"]),
    "too many in parts": (
        lambda files: [step(hidden(files, 40), 0, more=True), step(hidden(files, 25), 40)],
        ["at most 64 tokens in all"],
    ),
    "part with a gap": (
        lambda files: [step(hidden(files, 4), 0, more=True), step(hidden(files, 4), 5)],
        ["position: 5", "4, the next part of step 1"],
    ),
    "part of another step": (
        lambda files: [step(hidden(files, 4), 0, 1, more=True), step(hidden(files, 4), 4, 2)],
        ["the next part of step 1"],
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_a_step_that_does_not_fit_is_refused_with_what_would_be_right(
    case: str, trunk: Trunk, files: ModelFiles
) -> None:
    messages, words = LATER[case]
    with session(trunk, files, max_length=MAX_LENGTH) as raw:
        status, details = raw.refusal(*messages(files))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    for word in words:
        assert word in details


def test_bytes_flipped_at_random_never_break_the_server(trunk: Trunk, files: ModelFiles) -> None:
    dice = random.Random(3)
    expected = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    for _ in range(60):
        messages = [opening(files), step(hidden(files, 2), 0)]
        which = dice.randrange(2)
        spoiled = bytearray(messages[which])
        for _ in range(dice.randint(1, 4)):
            spoiled[dice.randrange(min(len(spoiled), 200))] = dice.randrange(256)
        messages[which] = bytes(spoiled)
        with Raw(trunk.address) as raw:
            try:
                raw.ask(messages[0])
                raw.ask(messages[1])
            except grpc.RpcError as error:
                failed: Any = error
                assert failed.code() in expected, (failed.details(), spoiled.hex())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_numbers_that_are_not_finite_are_refused_with_their_position(
    value: float, trunk: Trunk, files: ModelFiles
) -> None:
    x = hidden(files, 5)
    x[0, 4, 17] = value
    with session(trunk, files) as raw:
        raw.ask(step(x[:, :2], 0, 1))
        status, details = raw.refusal(step(x[:, 2:3], 2, 2, more=True), step(x[:, 3:], 3, 2))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert f"tensor.data: '{value} at position 4'" in details


def test_a_position_below_the_cached_length_must_say_that_it_rolls_back(trunk: Trunk, files: ModelFiles) -> None:
    with session(trunk, files) as raw:
        raw.ask(step(hidden(files, 3), 0, 1))
        status, details = raw.refusal(step(hidden(files, 1), 1, 2))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert "position: 1" in details
    assert "3; a smaller one needs truncate" in details


def test_a_rolled_back_session_answers_as_a_fresh_one(trunk: Trunk, files: ModelFiles) -> None:
    kept, dropped, then = hidden(files, 3, seed=1), hidden(files, 4, seed=2), hidden(files, 2, seed=3)
    with session(trunk, files) as raw:
        raw.ask(step(kept, 0, 1))
        raw.ask(step(dropped, 3, 2))
        rolled = tensor_of(raw.ask(step(then, 3, 3, truncate=True)), files)
    with session(trunk, files) as raw:
        raw.ask(step(kept, 0, 1))
        assert torch.equal(tensor_of(raw.ask(step(then, 3, 2)), files), rolled)


def test_a_step_in_parts_is_computed_as_one(trunk: Trunk, files: ModelFiles) -> None:
    x = hidden(files, 30)
    with session(trunk, files) as raw:
        whole = tensor_of(raw.ask(step(x, 0)), files)
    with session(trunk, files) as raw:
        parts = [step(x[:, at : at + 10], at, more=at < 20) for at in (0, 10, 20)]
        assert torch.equal(tensor_of(raw.ask(*parts), files), whole)


def test_a_session_fills_its_length_exactly(trunk: Trunk, files: ModelFiles) -> None:
    with session(trunk, files, max_length=8) as raw:
        raw.ask(step(hidden(files, 7), 0, 1))
        raw.ask(step(hidden(files, 1), 7, 2))
        _, details = raw.refusal(step(hidden(files, 1), 8, 3))
    assert "at most 8 tokens in all" in details


def test_sessions_do_not_see_each_other(trunk: Trunk, files: ModelFiles) -> None:
    texts = [hidden(files, 6, seed) for seed in (1, 2)]
    alone = []
    for x in texts:
        with session(trunk, files) as raw:
            alone.append([tensor_of(raw.ask(step(x[:, at : at + 2], at, at)), files) for at in (0, 2, 4)])
    with session(trunk, files) as one, session(trunk, files) as other:
        for index, at in enumerate((0, 2, 4)):
            for raw, x, wanted in zip((one, other), texts, alone, strict=True):
                assert torch.equal(tensor_of(raw.ask(step(x[:, at : at + 2], at, at)), files), wanted[index])


def test_without_a_cache_the_whole_prefix_gives_the_same(trunk: Trunk, files: ModelFiles) -> None:
    cached = answer(trunk.address, files)
    with session(trunk, files, flags=["inference_mode"]) as raw:
        raw.ask(step(hidden(files, 4)[:, :3], 0, 1))
        again = tensor_of(raw.ask(step(hidden(files, 4), 0, 2)), files)
        _, details = raw.refusal(step(hidden(files, 1), 4, 3))
    torch.testing.assert_close(again, cached)
    assert "without use_cache a step has the whole prefix" in details


def test_one_session_too_many_is_refused_until_one_ends(trunk: Trunk, files: ModelFiles) -> None:
    with ExitStack() as stack:
        sessions = [stack.enter_context(session(trunk, files)) for _ in range(SESSIONS)]
        with Raw(trunk.address) as raw:
            status, details = raw.refusal(opening(files))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 of 3 sessions" in details
        sessions[0].end()
        assert eventually(lambda: free_places(trunk.address, files) == 1)


def test_one_set_of_flags_too_many_is_refused_until_another_is_idle(trunk: Trunk, files: ModelFiles) -> None:
    with session(trunk, files, flags=["low_cpu_mem_usage"]) as one, session(trunk, files, flags=["output_attentions"]):
        with Raw(trunk.address) as raw:
            status, details = raw.refusal(opening(files, flags=["float32_matmul_precision"]))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "all 2 places for other sets of load and process flags (server.max_variants)" in details
        one.end()
        assert eventually(lambda: served_with(trunk.address, files, ["float32_matmul_precision"]))
        assert len(trunk.variants()) <= OTHERS


def served_with(address: str, files: ModelFiles, flags: list[str]) -> bool:
    """Whether a session with these flags is let in."""
    with Raw(address) as raw:
        raw.send(opening(files, flags=flags))
        try:
            return raw.receive().HasField("opened")
        except grpc.RpcError:
            return False


def test_the_same_flags_in_other_words_share_a_server(trunk: Trunk, files: ModelFiles) -> None:
    answer(trunk.address, files, flags=["use_cache", "float32_matmul_precision"])
    before = {other.pid for other in trunk.variants()}
    for flags in (
        ["use_cache", "float32_matmul_precision=medium"],
        ["use_cache", "low_cpu_mem_usage=off", "float32_matmul_precision", "float32_matmul_precision"],
    ):
        answer(trunk.address, files, flags=flags)
    assert {other.pid for other in trunk.variants()} == before


@pytest.mark.parametrize("how", ["end", "cancel"])
def test_sessions_that_end_leave_their_places(how: str, trunk: Trunk, files: ModelFiles) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            sessions = [stack.enter_context(session(trunk, files)) for _ in range(SESSIONS)]
            for raw in sessions:
                raw.ask(step(hidden(files, 5), 0))
                getattr(raw, how)()
        assert eventually(lambda: free_places(trunk.address, files) == SESSIONS)


@contextmanager
def holder(address: str, files: ModelFiles, sessions: int) -> Iterator[subprocess.Popen[str]]:
    """A client process that holds open sessions; killed at the end."""
    command = [sys.executable, "-c", HOLD, address, opening(files).hex(), str(sessions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def test_a_client_that_is_killed_leaves_its_places(trunk: Trunk, files: ModelFiles) -> None:
    with holder(trunk.address, files, SESSIONS) as client:
        assert free_places(trunk.address, files) == 0
        client.kill()
        assert eventually(lambda: free_places(trunk.address, files) == SESSIONS)


def test_a_client_that_stopped_answering_is_noticed(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    quicker = tuple((name, after_ms // 10) for name, after_ms in connections.KEEP_ALIVE)
    monkeypatch.setattr(connections, "KEEP_ALIVE", quicker)
    with serve_here(files) as here, holder(here.address, files, 2) as client:
        assert here.runtime.admission.sessions == 2
        client.send_signal(signal.SIGSTOP)  # its connection stays open, as that of a machine without power
        assert eventually(lambda: here.runtime.admission.sessions == 0)


def test_streams_that_say_nothing_do_not_keep_others_out(files: ModelFiles) -> None:
    with serve_here(files, max_sessions=SESSIONS, open_s=0.5) as here, ExitStack() as stack:
        for _ in range(4 * SESSIONS):
            stack.enter_context(Raw(here.address))
        assert answer(here.address, files).shape[1] == 4
        assert eventually(lambda: here.runtime.admission.sessions == 0)


def test_a_server_for_other_flags_that_is_killed_ends_its_session_and_is_replaced(
    trunk: Trunk, files: ModelFiles
) -> None:
    flags = ["use_cache", "low_cpu_mem_usage"]
    with session(trunk, files, flags=flags) as raw:
        raw.ask(step(hidden(files, 3), 0, 1))
        for other in trunk.variants():
            other.kill()
        status, _ = raw.refusal(step(hidden(files, 1), 3, 2))
    assert status is grpc.StatusCode.UNAVAILABLE
    assert answer(trunk.address, files, flags=flags).isfinite().all()


def test_a_session_that_comes_after_a_loss_gets_another_server(files: ModelFiles) -> None:
    flags, before = ["use_cache", "low_cpu_mem_usage"], set(forks_of())
    with serve_here(files) as here:
        with session(here, files, flags=flags) as raw:
            (child,) = set(forks_of()) - before
            child.kill()
            assert raw.refusal(step(hidden(files, 3), 0, 1))[0] is grpc.StatusCode.UNAVAILABLE
        assert eventually(lambda: served_with(here.address, files, flags))


def test_other_flags_give_what_their_own_server_gives(trunk: Trunk, files: ModelFiles) -> None:
    assert torch.equal(
        answer(trunk.address, files, flags=["use_cache", "low_cpu_mem_usage"]), answer(trunk.address, files)
    )


def test_memory_does_not_grow_with_the_sessions_that_were_there(trunk: Trunk, files: ModelFiles) -> None:
    def resident() -> int:
        return int(psutil.Process(trunk.process.pid).memory_info().rss)

    def stay(number: int) -> None:
        with session(trunk, files, max_length=512) as raw:
            raw.ask(step(hidden(files, 511), 0, 1))  # 2 layers * 2 heads * 12 * 2 * 4 bytes * 511 = 0.2 MB of cache
            raw.ask(step(hidden(files, 1), 511, 2))
            if number % 2:
                raw.end()

    # Every thread that handles a call has the math library's buffers then, 5 MB each; which one does is chance.
    for _ in range(2 * SESSIONS + SPARE_THREADS):
        with ThreadPoolExecutor(SESSIONS) as at_once:
            list(at_once.map(stay, range(SESSIONS)))
        assert eventually(lambda: free_places(trunk.address, files) == SESSIONS)
    for number in range(5):
        stay(number)
    after_five = resident()
    for number in range(45):
        stay(number)
    assert eventually(lambda: resident() <= 1.02 * after_five), (resident(), after_five)


def test_describe_says_what_is_served(trunk: Trunk, files: ModelFiles) -> None:
    said = describe(trunk.address)
    assert (said.protocol, said.model, said.digest) == (PROTOCOL, files.name, files.digest)
    assert (said.start, said.end, said.n_layers) == (PLAN.start, PLAN.end, PLAN.n_layers)
    assert (said.dtype, said.device, said.hidden_size, said.max_length) == ("float32", "cpu", 48, 512)
    unavailable = {flag.name: flag.unavailable for flag in said.flags if flag.unavailable}
    assert unavailable["use_fast"] == "does not act on this side"
    assert "CUDA" in unavailable["cudnn_benchmark"]
    assert "use_cache" not in unavailable


def test_health_is_serving_and_reflection_lists_the_service(trunk: Trunk) -> None:
    with grpc.insecure_channel(trunk.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            checked = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
    assert {service.name for service in reply.list_services_response.service} >= {SERVICE, "grpc.health.v1.Health"}


def test_a_port_that_is_taken_is_one_clear_line(trunk: Trunk, files: ModelFiles, tmp_path: Path) -> None:
    host, _, port = trunk.address.partition(":")
    (tmp_path / "config.yaml").write_text(str(settings(files)))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--port", port]
    process = Fork(server_main.main, arguments, tmp_path, tmp_path / "server.err")
    assert (process.wait(60), process.stdout.read()) == (2, "")
    process.close()
    last = (tmp_path / "server.err").read_text().splitlines()[-1]
    assert last.startswith(f"error: server.port: cannot listen on {host}:{port}")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"server": {"port": 99999}}, "server.port: 99999"),
        ({"server": {"max_sessions": 0}}, "server.max_sessions: 0"),
        ({"split": {"start": 5, "end": 3}}, "split.end: 3"),
        ({"nonsense": {}}, "config key: 'nonsense'"),
    ],
)
def test_a_config_that_cannot_be_served_is_one_clear_line(
    config: dict[str, Any], words: str, files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(str({**settings(files), **config}))
    assert server_main.main(["--config", str(tmp_path / "config.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_takes_those_for_other_flags_with_it(
    number: signal.Signals, files: ModelFiles, tmp_path: Path
) -> None:
    with serve(settings(files), tmp_path) as own, session(own, files, flags=["low_cpu_mem_usage"]) as raw:
        raw.ask(step(hidden(files, 3), 0))
        others = own.variants()
        assert others
        own.process.send_signal(number)
        assert own.process.wait(10) == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        assert eventually(lambda: all(gone(other.pid) for other in others))
        with pytest.raises(grpc.RpcError):
            raw.ask(step(hidden(files, 1), 3, 2))


def test_a_server_that_is_told_to_stop_lets_sessions_finish_and_nobody_in(files: ModelFiles, tmp_path: Path) -> None:
    with serve(settings(files, server={"drain_s": 60}), tmp_path) as own, session(own, files) as raw:
        with grpc.insecure_channel(own.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            raw.ask(step(hidden(files, 3), 0))
            own.process.send_signal(signal.SIGTERM)
            said = health_pb2.HealthCheckResponse.NOT_SERVING
            assert eventually(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == said)
            with Raw(own.address) as late:
                assert late.refusal(opening(files)) == (grpc.StatusCode.UNAVAILABLE, DRAINING)
            raw.ask(step(hidden(files, 1), 3, 2))
            raw.end()
        assert own.process.wait(10) == 0


def test_a_server_that_is_told_twice_does_not_wait(files: ModelFiles, tmp_path: Path) -> None:
    with serve(settings(files, server={"drain_s": 600}), tmp_path) as own, session(own, files):
        own.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            own.process.wait(1)
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(10) == 0
