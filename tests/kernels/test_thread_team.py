"""A team's threads compute the same numbers, however many there are, and whether or not its helpers have a core."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from splitlearn.kernels import llama_decode, thread_team
from splitlearn.kernels.block_format import BITS, LANES, to_blocks
from splitlearn.kernels.block_matmul import multiply
from splitlearn.kernels.llama_decode import KVPlace, Layers
from splitlearn.kernels.thread_team import Team

THREADS = (2, 3, 4, 8)  # more than a small machine has cores
TOKENS, LAYERS, GROUPS, SIZE, N_HEADS, INNER = 300, 3, 2, 32, 6, 320
WIDTH, TURN = N_HEADS * SIZE, np.full((2, SIZE), 0.7, np.float32)
DROPS = np.zeros(1, [("last", np.int64)])
SHAPES = [(WIDTH, WIDTH), *[(GROUPS * SIZE, WIDTH)] * 2, (WIDTH, WIDTH), *[(INNER, WIDTH)] * 2, (WIDTH, INNER)]


@pytest.fixture(scope="module", params=BITS)
def layers(request: pytest.FixtureRequest) -> Layers:
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=random) / 20 for _ in range(LAYERS) for shape in SHAPES]
    blocks = [to_blocks(weight, request.param).flatten().numpy() for weight in weights]
    ends = np.array([0, *accumulate(map(len, blocks))])
    norms = np.ones((LAYERS, 2, WIDTH), np.float32)
    return Layers(np.concatenate(blocks), ends, request.param, norms, 1e-5, N_HEADS, INNER, SIZE**-0.5)


def _decode(team: Team, layers: Layers, tokens: int = TOKENS, sessions: int = 1) -> NDArray[np.float32]:
    """The hidden states [tokens, sessions, WIDTH] that come of the last one, again and again, each token seeing those
    before in its session. Later sessions begin with a smaller one."""
    room = sessions * tokens
    caches = np.zeros((LAYERS, 2, GROUPS, room, SIZE), np.float32)
    addresses = np.array([[cache.ctypes.data for cache in pair] for pair in caches])
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32) / np.arange(1, 1 + sessions, dtype=np.float32)[:, None]
    starts, turns, outs = np.arange(0, room, tokens), np.stack([TURN] * sessions), list[NDArray[np.float32]]()
    for token in range(tokens):
        place = KVPlace(addresses, (GROUPS, room, SIZE), starts, np.full(sessions, token))
        with team.leading() as record:
            assert llama_decode.step(x, layers, place, turns, DROPS, 1, record)
        x /= np.abs(x).max(axis=1, keepdims=True)
        outs.append(x.copy())
    return np.stack(outs)


class _Late(Executor):
    """Helpers that come late by a time, or not at all."""

    def __init__(self, late_s: float | None) -> None:
        self._threads, self._late_s = ThreadPoolExecutor(8), late_s

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        late_s = self._late_s
        if late_s is None:
            return Future()

        def comes_late() -> None:
            time.sleep(late_s)
            function(*given)

        return self._threads.submit(comes_late)

    def shutdown(self, *given: Any, **named: Any) -> None:
        self._threads.shutdown(*given, **named)


@pytest.fixture
def others_at_work() -> Iterator[None]:
    """Two processes that want the cores for themselves."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.parametrize("threads", THREADS)
def test_a_token_is_the_same_bits_from_any_number_of_threads(layers: Layers, threads: int) -> None:
    assert np.array_equal(_decode(Team(threads), layers), _decode(Team(1), layers))


@pytest.mark.parametrize("sessions", [2, 5, 16])
def test_tokens_of_several_sessions_are_the_same_bits_from_any_number_of_threads(layers: Layers, sessions: int) -> None:
    one, other = (_decode(Team(threads), layers, 20, sessions) for threads in (1, 3))
    assert np.array_equal(one, other)
    np.testing.assert_allclose(one[:5, 0], _decode(Team(1), layers, 5)[:, 0], atol=1e-4)


@pytest.mark.usefixtures("others_at_work")
def test_more_threads_than_cores_beside_busy_processes_compute_the_same_bits(layers: Layers) -> None:
    assert np.array_equal(_decode(Team(8), layers), _decode(Team(1), layers))


@pytest.mark.parametrize("late_s", [0.0003, 0.003, None])
def test_helpers_that_come_late_or_never_change_no_bit_and_are_not_waited_for(
    layers: Layers, late_s: float | None
) -> None:
    with _Late(late_s) as pool:
        assert np.array_equal(_decode(Team(4, pool), layers), _decode(Team(1), layers))


def test_a_team_whose_helpers_cannot_be_started_computes_alone(layers: Layers) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    assert np.array_equal(_decode(Team(2, pool), layers, 10), _decode(Team(1), layers, 10))


def test_two_leaders_at_once_both_compute_the_same_bits(layers: Layers) -> None:
    team, expected = Team(3), _decode(Team(1), layers)
    with ThreadPoolExecutor(2) as leaders:
        found = list(leaders.map(lambda _: _decode(team, layers), range(4)))
    assert all(np.array_equal(each, expected) for each in found)


def test_helpers_leave_a_token_whose_leader_does_nothing_for_long() -> None:
    with ThreadPoolExecutor() as pool, Team(4, pool).leading():
        pool.shutdown(wait=True)  # ends when they have left


def test_outside_a_token_a_helper_has_nothing_to_do() -> None:
    team = Team(2)
    with team.leading() as record:
        pass
    thread_team.help_out(record)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _product(record: Any, blocks: Any, bits: Any, x: Any, out: Any) -> None:
    thread_team.product(record[0], blocks, 0, len(blocks), bits, x, out)


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 9))
def test_a_product_is_whole_whatever_its_columns_and_threads(bits: int, pieces: int, threads: int) -> None:
    blocks = to_blocks(torch.randn(pieces * LANES, 64), bits).flatten().numpy()
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    out, expected = (np.zeros((1, pieces * LANES), np.float32) for _ in range(2))
    multiply(blocks, bits, x, expected, 0, pieces * LANES)
    with Team(threads).leading() as record:
        _product(record, blocks, bits, x, out)
    assert np.array_equal(out, expected)


_who = numba.types.ExternalFunction("pthread_self", numba.types.uint64())
_sleep = numba.types.ExternalFunction("usleep", numba.types.int32(numba.types.uint32))


@numba.cfunc(thread_team.KIND_OF_WORK)  # type: ignore[untyped-decorator]
def _meets_others(record: Any, share: Any) -> Any:
    """Notes who took the share, and waits, a second at most, until as many shares are taken as there are threads."""
    team = numba.carray(record, (1,))[0]
    takers = numba.carray(thread_team._at(team.product.out, thread_team.NUMBER), (team.shares,))
    takers[share] = _who()
    for _ in range(1_000):
        if np.count_nonzero(takers) * thread_team.SHARES_PER_THREAD >= team.shares:
            break
        _sleep(1_000)
    return thread_team.WORKED


@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_a_team_takes_shares(threads: int) -> None:
    team, shares = Team(threads, work=_meets_others.address), thread_team.SHARES_PER_THREAD * threads
    blocks, x, takers = np.zeros(8, np.uint8), np.zeros((1, 64), np.float32), np.zeros((1, shares * LANES), np.int64)

    def found() -> int:
        takers[:] = 0
        with team.leading() as record:
            _product(record, blocks, 4, x, takers)
        return len({*takers.flatten()} - {0})

    # In a single token one may have had no core; in the first one nothing was compiled.
    assert any(found() == threads for _ in range(100))


@numba.cfunc(thread_team.KIND_OF_WORK)  # type: ignore[untyped-decorator]
def _raises(record: Any, share: Any) -> Any:
    if share == 0:
        raise MemoryError
    return thread_team.WORKED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numba says what it cannot raise
@pytest.mark.parametrize("threads", [1, 3])
def test_a_share_for_which_there_is_no_memory_fails_the_step(threads: int) -> None:
    team, x = Team(threads, work=_raises.address), np.ones((1, 64), np.float32)
    for _ in range(3):
        with pytest.raises(MemoryError), team.leading() as record:
            _product(record, np.zeros(8, np.uint8), 4, x, x)
