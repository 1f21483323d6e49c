"""The KV pool against a naive model of it: which tokens each session has."""

import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from splitlearn.kvcache.pool import KVPool, KVShape, Slot

BLOCKS, BLOCK_TOKENS = 8, 4
SHAPES = [(KVShape(1, 2), KVShape(1, 2)), (KVShape(2, 1), KVShape(1, 2))]


class PoolMachine(RuleBasedStateMachine):
    """Reserves and releases in any order."""

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool(SHAPES, BLOCKS, BLOCK_TOKENS, torch.float32, torch.device("cpu"))
        self.held: list[Slot] = []

    def _free(self) -> set[int]:
        taken = {at for run in self.held for at in range(run.start, run.start + run.tokens)}
        return set(range(BLOCKS * BLOCK_TOKENS)) - taken

    def _longest_free(self, start: int) -> int:
        longest = length = 0
        for at in range(start, BLOCKS * BLOCK_TOKENS):
            length = length + 1 if at in self._free() else 0
            longest = max(longest, length)
        return longest

    @rule(target=runs, tokens=st.integers(1, BLOCKS * BLOCK_TOKENS + 1), block=st.just(0) | st.integers(0, BLOCKS))
    def reserve(self, tokens: int, block: int) -> Slot | None:
        start = block * BLOCK_TOKENS
        free, fits = self._free(), self.pool.fits(tokens, start)
        run = self.pool.reserve(tokens, start)
        assert fits == (run is not None) == (tokens <= self._longest_free(start))
        assert run is None or run.start >= start
        if run is not None:
            assert run.tokens >= tokens
            assert run.start % BLOCK_TOKENS == run.tokens % BLOCK_TOKENS == 0
            assert set(range(run.start, run.start + run.tokens)) <= free
            self.held.append(run)
        return run

    @rule(run=consumes(runs))
    def release(self, run: Slot | None) -> None:
        if run is not None:
            self.held.remove(run)
            self.pool.release(run)

    @invariant()
    def used_blocks_are_those_that_sessions_hold(self) -> None:
        assert self.pool.blocks_used == sum(run.tokens for run in self.held) // BLOCK_TOKENS

    @invariant()
    def a_session_that_needs_all_fits_only_into_an_empty_pool(self) -> None:
        assert self.pool.fits(self.pool.capacity) == (not self.held)


TestPool = PoolMachine.TestCase


def test_what_one_session_writes_no_other_sees() -> None:
    pool = KVPool(SHAPES, BLOCKS, BLOCK_TOKENS, torch.float32, torch.device("cpu"))
    runs = [run for run in (pool.reserve(BLOCK_TOKENS) for _ in range(BLOCKS)) if run is not None]
    for number, run in enumerate(runs):
        for view in pool.views(run.start, run.tokens):
            view.fill_(number)
    for number, run in enumerate(runs):
        assert all(bool((view == number).all()) for view in pool.views(run.start, run.tokens))
