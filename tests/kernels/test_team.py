"""Two threads compute a token together: the same numbers, whoever comes late, does not come, or has come to another."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.kernels import team_phases
from splitlearn.kernels.block_format import BITS, LANES, from_blocks, to_blocks
from splitlearn.kernels.thread_team import CLOSED, DONE, NUMBER_AT, OPEN, SHARES, Lead, Team
from splitlearn.kvcache import layers as kv_layers
from splitlearn.models.cut import CutModel, example, forward
from splitlearn.runtime.torch_threads import computing_on
from splitlearn.stages import fused_decode, loading
from splitlearn.stages.fused_decode import Row
from tests.support.words import load_of

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
FLAGS = frozenset({"low_cpu_mem_usage", "use_cache", "cache", "output_attentions", "weight_dtype"})
LAYERS = 12


def _team(help_out: Callable[..., None] = team_phases.help_out) -> Team:
    return Team(help_out, team_phases.work.address, helped=True)


@pytest.fixture(scope="module", params=["trunk", "model"])
def cut_and_row(default_model: ModelFiles, request: pytest.FixtureRequest) -> tuple[CutModel, Row]:
    spec = loading.StageSpec("trunk", 3, 3 + LAYERS) if request.param == "trunk" else loading.full_specs(30)[0]
    with computing_on(fused_decode.HELPED_FROM):
        stage = loading.load(default_model, [spec], load_of(FLAGS), PLACEMENT).stages[0]
    assert stage.row is not None
    return stage.cut, stage.row


@contextmanager
def _with(row: Row, team: Team) -> Iterator[None]:
    own, row._team = row._team, team  # type: ignore[attr-defined]
    try:
        yield
    finally:
        team.wait()
        row._team = own  # type: ignore[attr-defined]


def _outs(cut: CutModel, row: Row, steps: int = 40) -> torch.Tensor:
    x = example(cut, 5)
    cache = kv_layers.reserved(cut.end - cut.start, 5 + steps)
    with torch.inference_mode():
        forward(cut, x[:, :4], 0, cache)
        outs = [row(x[:, 4:], 4 + at, cache) for at in range(steps)]
    return torch.cat([out for out in outs if out is not None])


def test_a_helper_changes_no_number(cut_and_row: tuple[CutModel, Row]) -> None:
    cut, row = cut_and_row
    helped = list[Lead]()

    def help_out(*lead: object) -> None:
        helped.append(Lead(*lead))  # type: ignore[arg-type]
        team_phases.help_out(*lead)

    with _with(row, Team(team_phases.help_out, team_phases.work.address, helped=False)):
        alone = _outs(cut, row)
    with _with(row, _team(help_out)):
        assert torch.equal(_outs(cut, row), alone)
    assert helped


def test_a_helper_that_does_not_come_is_not_waited_for(cut_and_row: tuple[CutModel, Row]) -> None:
    cut, row = cut_and_row
    expected, over = _outs(cut, row), threading.Event()

    def stays_away(*_: object) -> None:
        over.wait(240)

    team = _team(stays_away)
    with _with(row, team):
        assert torch.equal(_outs(cut, row), expected)
        assert team._helping is not None and not team._helping.done()
        over.set()


@pytest.mark.parametrize("late_s", [0.0005, 0.003])
def test_a_helper_may_come_at_any_time(cut_and_row: tuple[CutModel, Row], late_s: float) -> None:
    cut, row = cut_and_row
    expected = _outs(cut, row)

    def help_out(*lead: object) -> None:
        time.sleep(late_s)
        team_phases.help_out(*lead)

    with _with(row, _team(help_out)):
        assert torch.equal(_outs(cut, row), expected)


def test_a_stage_has_a_helper_with_enough_threads_and_enough_to_do(default_model: ModelFiles) -> None:
    def helped(layers: int, threads: int) -> bool:
        with computing_on(threads):
            row = (
                loading.load(default_model, [loading.StageSpec("trunk", 3, 3 + layers)], load_of(FLAGS), PLACEMENT)
                .stages[0]
                .row
            )
        return bool(row._team._helped)  # type: ignore[union-attr]

    assert helped(LAYERS, fused_decode.HELPED_FROM)
    assert not helped(LAYERS, fused_decode.HELPED_FROM - 1)
    assert not helped(1, fused_decode.HELPED_FROM)


def test_who_finds_the_helper_with_another_leader_is_alone() -> None:
    team = _team()
    with team.leading() as first, team.leading() as second:
        assert (first.shares, second.shares) == (SHARES, 1)
        assert first.memory is not second.memory
    with team.leading() as again:
        assert again.shares == SHARES
    team.wait()


def test_outside_a_step_nothing_is_open_and_a_helper_has_nothing_to_do() -> None:
    team = _team()
    with team.leading() as lead:
        assert lead.memory[OPEN] & CLOSED == SHARES
    assert lead.memory[OPEN] & CLOSED == CLOSED
    assert team_phases.help_out(*lead) == 1


def test_what_a_helper_raises_is_raised_by_the_next_step() -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    team = _team(fails)
    with team.leading():
        pass
    with pytest.raises(ZeroDivisionError):
        team.wait()
    with team.leading():
        pass
    while team._helping is not None and not team._helping.done():
        time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), team.leading():
        pass
    assert team.leading().__enter__().shares == SHARES


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _multiply(memory: Any, shares: Any, blocks: Any, bits: Any, x: Any, out: Any) -> None:
    team_phases.product(memory, shares, blocks, 0, len(blocks), bits, x, out)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [LANES, 3 * LANES, 5 * LANES, 64 * LANES])
def test_a_phase_is_done_whole_however_many_columns_there_are(bits: int, columns: int) -> None:
    matrix = to_blocks(torch.randn(columns, 64), bits)
    x, out, alone = np.ones((1, 64), np.float32), np.zeros((1, columns), np.float32), np.zeros((1, columns), np.float32)
    team, blocks = _team(), matrix.flatten().numpy()
    _multiply(*team.alone(), blocks, bits, x, alone)
    for _ in range(50):
        out[:] = 0
        with team.leading() as lead:
            _multiply(*lead, blocks, bits, x, out)
        assert np.array_equal(out, alone)
    expected = torch.from_numpy(x) @ from_blocks(matrix, columns, 64).T
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4)


def test_a_helper_does_all_that_the_leader_leaves() -> None:
    matrix = to_blocks(torch.randn(10 * LANES, 64), 4)
    x, out = np.ones((1, 64), np.float32), np.zeros((1, 10 * LANES), np.float32)
    memory = _team().alone().memory
    _multiply(memory, 1, matrix.flatten().numpy(), 4, x, out)
    expected, out[:] = out.copy(), 0
    memory[OPEN], memory[DONE] = 1 << NUMBER_AT, 0
    team_phases.help_out(memory, SHARES)
    assert np.array_equal(out, expected)
    assert memory[OPEN] == (1 << NUMBER_AT) + SHARES and memory[DONE] == SHARES


@numba.cfunc(team_phases.KIND_OF_WORK)  # type: ignore[untyped-decorator]
def _raises(arguments: Any, share: Any, shares: Any) -> Any:
    if share == shares - 1:
        raise MemoryError
    return team_phases.WORKED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numba says what it cannot raise
@pytest.mark.parametrize("helped", [False, True])
def test_a_share_for_which_there_is_no_memory_fails_the_step(helped: bool) -> None:
    team = Team(team_phases.help_out, _raises.address, helped=helped)
    x = np.ones((1, 64), np.float32)
    for _ in range(3):
        with pytest.raises(MemoryError), team.leading() as lead:
            _multiply(*lead, np.zeros(8, np.uint8), 4, x, x)
    team.wait()
