"""The client's stage at the far end of a stream: what it sends, what it counts, and what it says when a trunk fails."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import grpc
import pytest
import torch

from splitlearn.arms.serving import Departure
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteSession, RemoteStage
from splitlearn.client.served import check_served, describe
from splitlearn.errors import TrunkError, TrunkFailed, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.wire import SERVICE, codec
from splitlearn.wire import trunk_pb2 as pb
from tests.conftest import TinyFactory
from tests.support.trunk import PLAN, TrunkHere, encoded, eventually, hidden, serve_here, served
from tests.support.words import load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode"})
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def here(files: ModelFiles) -> Iterator[TrunkHere]:
    with serve_here(files, max_sessions=2, max_waiting=0) as running:
        yield running


@pytest.fixture
def stage(here: TrunkHere, files: ModelFiles) -> Iterator[RemoteStage]:
    remote = RemoteStage([here.address], served(files), timeout_s=20)
    yield remote
    remote.close()
    assert eventually(lambda: here.runtime.admission.sessions == 0), "a session outlived its client's channel"


@contextmanager
def opened(stage: RemoteStage, applied: frozenset[str] = CACHED) -> Iterator[RemoteSession]:
    with contextlib.closing(stage.open(session_of(applied), MAX_LENGTH)) as session:
        yield session


def small_messages(monkeypatch: pytest.MonkeyPatch, files: ModelFiles) -> None:
    """Let 10 tokens be the most that fits into a message, at both ends."""
    monkeypatch.setattr(codec, "MAX_TENSOR_BYTES", 10 * files.facts.hidden_size * 4)


def test_a_remote_stage_gives_what_the_same_layers_give_here(stage: RemoteStage, files: ModelFiles) -> None:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    local = loading.load(files, loading.trunk_specs(PLAN), load_of(frozenset()), placement).stages[0]
    x = hidden(files, 9)
    with opened(stage) as remote:
        here_session = local.open(session_of(CACHED), MAX_LENGTH)
        for start, end in ((0, 6), (6, 7), (7, 9)):
            (far,) = stage.step([StageInput(remote, start, x[:, start:end])])
            (near,) = local.step([StageInput(here_session, start, x[:, start:end])])
            torch.testing.assert_close(far.x, near.x)


def test_a_long_prompt_goes_and_comes_in_parts_and_gives_the_same(
    stage: RemoteStage, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = hidden(files, 95)
    with opened(stage) as session:
        whole = session.step(0, x)
    small_messages(monkeypatch, files)
    with opened(stage) as session:
        parts = session.step(0, x)
        then = session.step(95, x[:, :1])
    assert torch.equal(parts.x, whole.x)
    assert then.x.shape == (1, 1, files.facts.hidden_size)
    assert parts.timing.bytes_up > whole.timing.bytes_up
    assert parts.timing.bytes_down > whole.timing.bytes_down


def test_a_step_back_says_that_it_rolls_back(stage: RemoteStage, files: ModelFiles) -> None:
    kept, dropped, then = hidden(files, 5, seed=1), hidden(files, 3, seed=2), hidden(files, 2, seed=3)
    with opened(stage) as session:
        session.step(0, kept)
        session.step(5, dropped)
        rolled = session.step(5, then).x
    with opened(stage) as session:
        session.step(0, kept)
        assert torch.equal(session.step(5, then).x, rolled)


def test_a_trunk_without_a_cache_is_sent_the_whole_prefix_each_time(stage: RemoteStage, files: ModelFiles) -> None:
    x = hidden(files, 5)
    with opened(stage) as session:
        cached = session.step(0, x).x
    with opened(stage, frozenset()) as session:
        session.step(0, x[:, :4])
        torch.testing.assert_close(session.step(0, x).x, cached)


def test_the_ledger_of_a_step_is_the_time_that_it_took(stage: RemoteStage, files: ModelFiles) -> None:
    with opened(stage) as session:
        session.step(0, hidden(files, 3))
        rests = []
        for position in range(3, 13):
            started = time.perf_counter()
            timing = session.step(position, hidden(files, 1)).timing
            spent = time.perf_counter() - started
            assert set(timing.ledger) == {"encode", "wire", "queue", "trunk", "decode"}
            assert min(timing.ledger.values()) >= 0
            rests.append((spent - sum(timing.ledger.values())) / spent)
    assert min(rests) >= 0
    assert median(rests) < 0.1  # in one or another this process has no core between two looks at the clock


def test_a_decoded_token_costs_its_values_and_at_most_a_hundred_bytes_each_way(
    stage: RemoteStage, files: ModelFiles
) -> None:
    with opened(stage) as session:
        session.step(0, hidden(files, 200))
        timing = session.step(200, hidden(files, 1)).timing
    values = files.facts.hidden_size * 4
    assert values < timing.bytes_up <= values + 100
    assert values < timing.bytes_down <= values + 100


def test_a_closed_session_is_free_at_the_trunk_and_has_told_its_memory(
    stage: RemoteStage, here: TrunkHere, files: ModelFiles
) -> None:
    with opened(stage) as session:
        session.step(0, hidden(files, 3))
        assert here.runtime.admission.sessions == 1
        assert stage.facts.peak_rss_bytes == 0
    assert eventually(lambda: here.runtime.admission.sessions == 0)
    assert stage.facts.peak_rss_bytes > stage.facts.import_rss_bytes > 0
    session.close()  # a second time does nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other", "digest": "0" * 64}, "model is .*, not 'other'; digest is"),
        ({"plan": SplitPlan(1, 4, 6)}, r"layer range is \(2, 4, 6\), not \(1, 4, 6\)"),
        ({"dtype": "bfloat16"}, "dtype is float32, not 'bfloat16'"),
    ],
)
def test_a_trunk_that_serves_something_else_refuses(
    changes: dict[str, Any], words: str, here: TrunkHere, files: ModelFiles
) -> None:
    stage = RemoteStage([here.address], replace(served(files), **changes), timeout_s=20)
    with contextlib.closing(stage), pytest.raises(TrunkRefused, match=f"FAILED_PRECONDITION.*{words}"):
        stage.open(session_of(CACHED), MAX_LENGTH)


def test_what_a_trunk_serves_is_compared_before_anything_is_run(here: TrunkHere, files: ModelFiles) -> None:
    said = describe(here.address)
    check_served(said, served(files), here.address)
    other = replace(served(files), plan=SplitPlan(0, 6, 6), dtype="float16")
    with pytest.raises(TrunkRefused) as caught:
        check_served(said, other, here.address)
    for word in (here.address, "[2, 4)", "[0, 6)", "float32", "float16"):
        assert word in str(caught.value)
    assert "digest" not in str(caught.value)
    with pytest.raises(TrunkRefused, match=f"model: it serves {files.name}, this client has other; weights digest"):
        check_served(said, replace(served(files), model="other", digest="0" * 64), here.address)


def test_two_names_of_the_same_weights_are_one_model(here: TrunkHere, files: ModelFiles) -> None:
    elsewhere = replace(served(files), model="/another/path")
    check_served(describe(here.address), elsewhere, here.address)
    with contextlib.closing(RemoteStage([here.address], elsewhere, timeout_s=20)) as stage, opened(stage) as session:
        assert session.step(0, hidden(files, 3)).x.shape[1] == 3


def test_a_full_trunk_says_so(stage: RemoteStage, here: TrunkHere, files: ModelFiles) -> None:
    hasty = RemoteStage([here.address], served(files), timeout_s=0.5)
    with contextlib.closing(hasty), opened(stage), opened(stage), pytest.raises(TrunkFull, match="2 of 2 sessions"):
        hasty.open(session_of(CACHED), MAX_LENGTH)


def test_a_step_that_the_trunk_refuses_ends_the_session_with_its_words(stage: RemoteStage, files: ModelFiles) -> None:
    with opened(stage) as session, pytest.raises(TrunkRefused, match="at most 256 tokens in all"):
        session.step(0, hidden(files, MAX_LENGTH + 1))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def test_nobody_at_the_address_is_said_at_once_with_what_to_do(files: ModelFiles) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(TrunkUnavailable, match=f"{address}.*python -m server --config config.yaml"):
        RemoteStage([address], served(files), timeout_s=3600).open(session_of(CACHED), MAX_LENGTH)
    with pytest.raises(TrunkUnavailable, match=address):
        describe(address)


@contextmanager
def strange_trunk(answer: Callable[[int, pb.ClientMessage], bytes | None]) -> Iterator[str]:
    """A server that speaks gRPC and answers message number n with what `answer` says; None is no answer at all."""
    over = threading.Event()

    def session(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for number, raw in enumerate(requests):
            reply = answer(number, pb.ClientMessage.FromString(raw))
            if reply is None:
                over.wait(20)
                return
            yield reply

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(session)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Session": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        over.set()
        server.stop(grace=0).wait()


OPENED = pb.ServerMessage(opened=pb.Opened(threads=1)).SerializeToString()


def result(asked: pb.Step, x: torch.Tensor, **changes: Any) -> bytes:
    right = {"sequence_id": asked.sequence_id, "step_id": asked.step_id, "hidden": encoded(x)}
    return pb.ServerMessage(result=pb.StepResult(**{**right, **changes})).SerializeToString()


STRANGE: dict[str, tuple[Callable[[pb.Step], bytes], str]] = {
    "garbage": (lambda asked: b"\xff\xff", "sent a malformed answer"),
    "another step": (lambda asked: result(asked, torch.zeros(1, 3, 48), step_id=9), "answered step 9 instead of"),
    "not a result": (lambda asked: OPENED, "another answer than 'result'"),
    "too few positions": (lambda asked: result(asked, torch.zeros(1, 2, 48)), "answered 2 positions instead of 3"),
    "another width": (lambda asked: result(asked, torch.zeros(1, 3, 47)), "tensor.shape"),
    "another dtype": (lambda asked: result(asked, torch.zeros(1, 3, 48).half()), "tensor.dtype"),
    "too little data": (
        lambda asked: result(asked, torch.zeros(1, 1, 48), hidden=pb.Tensor(dtype=pb.FLOAT32, shape=(1, 3, 48))),
        "tensor.data",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_trunk_that_answers_nonsense_is_an_error_of_the_trunk(case: str, files: ModelFiles) -> None:
    reply, words = STRANGE[case]
    with strange_trunk(lambda number, message: reply(message.step) if number else OPENED) as address:
        stage = RemoteStage([address], served(files), timeout_s=20)
        with contextlib.closing(stage), opened(stage) as session, pytest.raises(TrunkFailed, match=words):
            session.step(0, hidden(files, 3))


def test_a_first_answer_that_is_not_opened_is_an_error_of_the_trunk(files: ModelFiles) -> None:
    with strange_trunk(lambda number, message: result(message.step, torch.zeros(1, 1, 48))) as address:
        stage = RemoteStage([address], served(files), timeout_s=20)
        with contextlib.closing(stage), pytest.raises(TrunkFailed, match="another answer than 'opened'"):
            stage.open(session_of(CACHED), MAX_LENGTH)


def test_a_trunk_that_does_not_answer_in_time_is_given_up_with_the_setting_to_raise(files: ModelFiles) -> None:
    with strange_trunk(lambda number, message: None if number else OPENED) as address:
        stage = RemoteStage([address], served(files), timeout_s=0.5)
        late = pytest.raises(TrunkUnavailable, match=r"within 0\.5 s\. Raise trunk\.timeout_s")
        with contextlib.closing(stage), opened(stage) as session, late:
            session.step(0, hidden(files, 3))


def test_a_trunk_that_went_away_in_the_middle_is_an_error_of_the_trunk(files: ModelFiles) -> None:
    with strange_trunk(lambda number, message: OPENED) as address:
        stage = RemoteStage([address], served(files), timeout_s=2)
        session = stage.open(session_of(CACHED), MAX_LENGTH)
    with contextlib.closing(stage), contextlib.closing(session), pytest.raises(TrunkError, match=address):
        session.step(0, hidden(files, 3))


def test_a_thing_that_speaks_no_grpc_is_an_error_of_the_trunk(files: ModelFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"

        def speak_http() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=speak_http, daemon=True).start()
        with pytest.raises(TrunkUnavailable, match=address):
            describe(address, timeout_s=5)


@pytest.mark.parametrize("max_waiting", [1, 0], ids=["in the trunk's queue", "between two tries at a full trunk"])
def test_an_opening_ends_when_its_client_goes_and_nobody_suffers(files: ModelFiles, max_waiting: int) -> None:
    departure = Departure()
    with serve_here(files, max_sessions=1, max_waiting=max_waiting) as full, ThreadPoolExecutor(1) as threads:
        stage = RemoteStage([full.address], served(files), timeout_s=600)
        with contextlib.closing(stage), opened(stage) as first:
            waiting = threads.submit(stage.for_client(departure.when_gone).open, session_of(CACHED), MAX_LENGTH)
            rejected = re.compile(r'cause="queue_full".* [1-9]')
            assert eventually(lambda: full.runtime.admission.waiting or rejected.search(full.runtime.metrics.text()))
            departure.leave()
            assert isinstance(waiting.exception(60), TrunkUnavailable)
            assert eventually(lambda: full.runtime.admission.waiting == 0)
            with pytest.raises(TrunkUnavailable, match="has gone"):
                stage.for_client(departure.when_gone).open(session_of(CACHED), MAX_LENGTH)
            assert first.step(0, hidden(files, 3)).x.shape[1] == 3
        assert eventually(lambda: full.runtime.admission.sessions == 0)
