"""A step that its client wants no more is given up: before it begins, between layers, or not where that is too late."""

import threading
import time
from contextlib import closing

import grpc
import numpy as np
import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.session_stream import Stream
from splitlearn.errors import StepUnwanted, TrunkFailed
from splitlearn.stages import loading
from splitlearn.stages.base import DROPS, DropMark, StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.wire import SERVICE
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import open_channel
from tests.support.client import CACHED
from tests.support.trunk import Raw, TrunkHere, hidden, opening, serve, served, settings, step, tensor_of
from tests.support.words import load_of, session_of

FAST = CACHED | {"low_cpu_mem_usage", "cache", "output_attentions", "output_hidden_states", "weight_dtype"}


def _drop(address: str, request: bytes) -> None:
    with open_channel(address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Drop")
        assert method(request, timeout=10) == pb.DropReply().SerializeToString()


def _named(key: bytes, step_id: int) -> bytes:
    return pb.DropRequest(key=key, step_id=step_id).SerializeToString()


def _open(raw: Raw, files: ModelFiles) -> bytes:
    return raw.ask(opening(files, flags=sorted(CACHED))).opened.key


def test_a_step_that_is_dropped_before_it_comes_is_not_computed(here: TrunkHere, files: ModelFiles) -> None:
    x = hidden(files, 5)
    with Raw(here.address) as one, Raw(here.address) as other:
        key = _open(one, files)
        _open(other, files)
        one.ask(step(x[:, :3], 0))
        _drop(here.address, _named(key, 2))
        dropped = one.ask(step(x[:, 3:4], 3, 2, uncertain=True)).result
        assert dropped.dropped and not dropped.hidden.data and dropped.step_id == 2
        then = one.ask(step(x[:, 4:], 3, 3))
        other.ask(step(x[:, :3], 0))
        assert torch.equal(tensor_of(then, files), tensor_of(other.ask(step(x[:, 4:], 3, 2)), files))
        assert one.end().WhichOneof("kind") == "closed"


@pytest.mark.parametrize("case", ["certain", "later", "another key", "no key"])
def test_no_other_step_is_dropped(here: TrunkHere, files: ModelFiles, case: str) -> None:
    with Raw(here.address) as raw:
        key = _open(raw, files)
        asked = {
            "certain": _named(key, 9),
            "later": _named(key, 1),
            "another key": _named(bytes(len(key)), 9),
            "no key": _named(b"", 9),
        }[case]
        _drop(here.address, asked)
        reply = raw.ask(step(hidden(files, 3), 0, 2, uncertain=case != "certain"))
        assert tensor_of(reply, files).shape[1] == 3 and not reply.result.dropped


def test_what_is_no_request_is_refused_and_drops_nothing(here: TrunkHere, files: ModelFiles) -> None:
    with Raw(here.address) as raw:
        _open(raw, files)
        with pytest.raises(grpc.RpcError) as refused:
            _drop(here.address, b"\xff" * 40)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "DropRequest" in (refused.value.details() or "")
        reply = raw.ask(step(hidden(files, 3), 0, 1, uncertain=True))
        assert tensor_of(reply, files).shape[1] == 3 and not reply.result.dropped


def test_a_step_at_a_server_for_other_flags_is_dropped_there(
    files: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = sorted(CACHED | {"low_cpu_mem_usage"})
    with serve(settings(files), tmp_path_factory.mktemp("drop")) as trunk, Raw(trunk.address) as raw:
        key = raw.ask(opening(files, flags=flags)).opened.key
        assert trunk.variants()
        _drop(trunk.address, _named(key, 1))
        assert raw.ask(step(hidden(files, 1), 0, 1, uncertain=True)).result.dropped


def test_a_client_hears_of_a_dropped_step_and_goes_on(here: TrunkHere, files: ModelFiles) -> None:
    x = hidden(files, 6)
    with (
        closing(RemoteStage([here.address], served(files), 20)) as stage,
        closing(stage.open(session_of(CACHED), 16)) as session,
        closing(stage.open(session_of(CACHED), 16)) as alone,
    ):
        session.step(0, x[:, :3])
        begun = session.begin(3, x[:, 3:4], uncertain=True)
        begun.drop()
        wanted = session.begin(3, x[:, 4:5])
        assert begun.finish().x.shape[1] in (0, 1)  # it may have been there before
        found = wanted.finish().x  # before the other session has steps: they would share a forward, and round otherwise
        alone.step(0, x[:, :3])
        assert torch.equal(found, alone.step(3, x[:, 4:5]).x)


def test_a_trunk_that_drops_what_is_wanted_has_failed(
    here: TrunkHere, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        closing(RemoteStage([here.address], served(files), 20)) as stage,
        closing(stage.open(session_of(CACHED), 16)) as session,
    ):
        stream: Stream = session._stream
        _drop(here.address, _named(stream.key, 1))
        with pytest.raises(TrunkFailed):
            session.begin(0, hidden(files, 1), uncertain=True).finish()


def test_a_step_is_given_up_between_layers(default_model: ModelFiles) -> None:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    stage = loading.load(default_model, [loading.StageSpec("trunk", 3, 13)], load_of(FAST), placement).stages[0]
    x = torch.randn(1, 4, 576, generator=torch.Generator().manual_seed(3))
    one, other = stage.open(session_of(FAST), 8), stage.open(session_of(FAST), 8)
    for session in (one, other):
        stage.step([StageInput(session, 0, x[:, :2])])
    assert any(_dropped_between_layers(stage, one, x[:, 2:3]) for _ in range(1000))
    outs = [stage.step([StageInput(session, 2, x[:, 3:])])[0].x for session in (one, other)]
    assert torch.equal(*outs)
    kept = stage.step([StageInput(one, 2, x[:, 3:], mark=DropMark(np.zeros(1, DROPS), 1))])[0].x
    assert torch.equal(kept, outs[1])


def _dropped_between_layers(stage: LocalStage, session: LocalSession, x: torch.Tensor) -> bool:
    """Drop a step at position 2 once its first layer has written its key. False where that came too late."""
    assert session.cache is not None
    keys = [layer.keys[0, 0, 2].numpy() for layer in session.cache.layers]
    for key in keys:
        key[:] = np.pi
    mark, first, over = DropMark(np.zeros(1, DROPS), 1), keys[0], threading.Event()

    def drop() -> None:
        while first[-1] == np.float32(np.pi) and not over.is_set():
            time.sleep(0)
        mark.drops["last"] = 1

    dropper = threading.Thread(target=drop)
    dropper.start()
    try:
        stage.step([StageInput(session, 2, x, mark=mark)])
    except StepUnwanted:
        return bool((keys[-1] == np.float32(np.pi)).all())
    finally:
        over.set()
        dropper.join()
    return False
