"""A stage computes a token on several threads where it is set to more than two and reads enough; the numbers stay."""

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.kvcache.layers import reserved
from splitlearn.models.cut import example, forward
from splitlearn.runtime.torch_threads import computing_on
from splitlearn.stages import fused_decode, loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from tests.support.words import load_of, session_of

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
FLAGS = frozenset({"low_cpu_mem_usage", "use_cache", "cache", "output_attentions", "weight_dtype"})
TRUNK, FULL = loading.StageSpec("trunk", 3, 15), loading.full_specs(30)[0]


def _stage(files: ModelFiles, spec: loading.StageSpec, threads: int) -> LocalStage:
    with computing_on(threads):
        return loading.load(files, [spec], load_of(FLAGS), PLACEMENT).stages[0]


def _outs(stage: LocalStage, steps: int = 40) -> torch.Tensor:
    x, cache = example(stage.cut, 5), reserved(stage.cut.end - stage.cut.start, 5 + steps)
    assert stage.faster is not None
    session = stage.session(cache, session_of(FLAGS), 5 + steps)
    with torch.inference_mode():
        forward(stage.cut, x[:, :4], 0, cache)
        outs = [stage.faster.token(StageInput(session, 4 + at, x[:, 4:])) for at in range(steps)]
    return torch.cat(outs)


@pytest.mark.parametrize("spec", [TRUNK, FULL], ids=["trunk", "full"])
def test_a_token_is_the_same_bits_whatever_the_threads(default_model: ModelFiles, spec: loading.StageSpec) -> None:
    alone = _outs(_stage(default_model, spec, 1))
    assert len(alone) == 40
    for threads in (4, 16):
        assert torch.equal(_outs(_stage(default_model, spec, threads)), alone)


@pytest.mark.parametrize(("setting", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4), (16, 8)])
def test_half_of_the_threads_compute_a_token_and_one_where_it_reads_little(setting: int, threads: int) -> None:
    with computing_on(setting):
        assert fused_decode.threads_for(fused_decode.HELPED_BYTES) == threads
        assert fused_decode.threads_for(fused_decode.HELPED_BYTES - 1) == 1
