"""The limits of server: each is set in the configuration, and its refusal names it."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.served import describe
from splitlearn.errors import InputError
from splitlearn.models.cut import layers_of
from splitlearn.stages.fused_decode import FusedEngine
from splitlearn.wire import SERVICE
from splitlearn.wire.channel import open_channel
from tests.conftest import TinyFactory
from tests.support.trunk import PLAN, Raw, TrunkHere, eventually, hidden, opening, serve_here, served, step
from tests.support.words import session_of

DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def here(files: ModelFiles) -> Iterator[TrunkHere]:
    limits = {"max_length": 200, "max_message_bytes": 8192, "open_s": 0.5, "idle_s": 2.0, "max_sessions": 3}
    with serve_here(files, **limits) as running:
        yield running


def end_of(raw: Raw) -> tuple[grpc.StatusCode, str]:
    """The status that a stream ends with, all answers before it passed by."""
    try:
        while True:
            raw.receive()
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code(), failed.details()


def test_a_session_is_no_longer_than_the_settings_allow(here: TrunkHere, files: ModelFiles) -> None:
    assert describe(here.address).max_length == 200
    with Raw(here.address) as raw:
        status, details = raw.refusal(opening(files, max_length=201))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_length: 201 cannot be used; expected 1 to 200 tokens" in details


def test_a_message_over_the_limit_is_refused_before_it_is_read(here: TrunkHere, files: ModelFiles) -> None:
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=40))
        status, details = raw.refusal(bytes(8193))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max (8193 vs. 8192)" in details


def test_a_prompt_goes_in_parts_that_the_server_takes(here: TrunkHere, files: ModelFiles) -> None:
    x = hidden(files, 200)  # 38,400 bytes
    stage = RemoteStage([here.address], served(files), 20)
    session = stage.open(session_of(frozenset({"use_cache"})), 200)
    answer = session.step(0, x)
    assert answer.x.shape == x.shape
    assert answer.timing.bytes_up > x.nbytes
    session.close()
    stage.close()


def test_a_limit_into_which_no_step_fits_is_named(files: ModelFiles) -> None:
    limited = serve_here(files, max_message_bytes=1215)
    with pytest.raises(InputError, match=r"server\.max_message_bytes: 1215 .* at least 1216"), limited:
        pass


def test_a_stream_that_opens_nothing_is_ended_with_the_setting(here: TrunkHere) -> None:
    with Raw(here.address) as raw:
        assert end_of(raw) == (DEADLINE, "the client was silent for 0.5 s (server.open_s)")


def test_a_session_that_is_idle_is_ended_with_the_setting_and_frees_its_place(
    here: TrunkHere, files: ModelFiles
) -> None:
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=40))
        raw.ask(step(hidden(files, 3), 0))
        assert here.runtime.admission.sessions == 1
        assert end_of(raw) == (DEADLINE, "the client was silent for 2 s (server.idle_s)")
    assert eventually(lambda: here.runtime.admission.sessions == 0)


def test_a_session_that_goes_on_is_not_idle(here: TrunkHere, files: ModelFiles) -> None:
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=40))
        for position in range(8):
            assert raw.ask(step(hidden(files, 1), position, position + 1)).result.step_id == position + 1
            time.sleep(0.35)


def test_the_layer_is_named_where_a_token_goes_through_all_in_one_call(default_model: ModelFiles) -> None:
    flags = ["use_cache", "inference_mode", "output_attentions", "output_hidden_states", "weight_prepack=blocks"]
    plan, x = replace(PLAN, n_layers=default_model.n_layers), hidden(default_model, 4)
    with serve_here(default_model, f"trunk:{','.join(flags)}") as here, Raw(here.address) as raw:
        stage = here.runtime.stage
        assert isinstance(stage.faster, FusedEngine)
        raw.ask(opening(here.runtime.files, plan, flags=flags))
        raw.ask(step(x[:, :3], 0, 1))
        layer: Any = layers_of(stage.cut)[1]
        layer.mlp.down_proj.array.view(np.float32)[:] = np.nan
        code, details = raw.refusal(step(x[:, 3:], 3, 2))
        assert code is grpc.StatusCode.INTERNAL
        assert (
            f"nan at position 3, first in layer {PLAN.start + 1}. Its weights hold numbers that are not finite"
            in details
        )


def test_numbers_that_overflow_in_a_layer_are_an_error_of_the_trunk_that_names_it(tiny_model: TinyFactory) -> None:
    files = tiny_model("gpt2")
    huge = torch.full((1, 2, files.facts.hidden_size), 3.0e38)
    with serve_here(files) as here, Raw(here.address) as other, Raw(here.address) as raw:
        other.ask(opening(files))
        before = other.ask(step(hidden(files, 3), 0, 1)).result.hidden.data
        raw.ask(opening(files))
        status, details = raw.refusal(step(huge, 0))
        assert status is grpc.StatusCode.INTERNAL
        assert "nan at position 0, first in layer 2." in details
        again = other.ask(step(hidden(files, 3), 0, 2, truncate=True)).result.hidden.data
    assert again == before


def test_a_client_that_takes_no_answers_is_ended(here: TrunkHere, files: ModelFiles) -> None:
    """It has asked for more than fits into the connection's window, and reads nothing of it."""
    asked = [opening(files, max_length=40)]
    asked += [step(hidden(files, 40), 0, number, truncate=number > 1) for number in range(1, 200)]
    with open_channel(here.address) as channel:
        method: Any = channel.stream_stream(f"/{SERVICE}/Session")
        more = threading.Event()

        def say() -> Iterator[bytes]:
            yield from asked
            more.wait(30)

        call = method(say(), timeout=30)
        next(call)
        assert here.runtime.admission.sessions == 1
        assert eventually(lambda: here.runtime.admission.sessions == 0)
        call.cancel()
        more.set()


def test_batch_sessions_leave_half_of_the_places_to_others(files: ModelFiles) -> None:
    with serve_here(files, max_sessions=4, kv_block_tokens=64) as here, ExitStack() as stack:
        raws = [stack.enter_context(Raw(here.address)) for _ in range(5)]
        for raw in raws[:2]:
            assert raw.ask(opening(files, batch=True)).HasField("opened")
        status, details = raws[2].refusal(opening(files, batch=True, timeout_s=0.1))
        assert (status, "no room" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        for raw in raws[3:]:
            assert raw.ask(opening(files)).HasField("opened")
