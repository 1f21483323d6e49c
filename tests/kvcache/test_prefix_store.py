"""The store of kept prefixes: within its budget after anything, exact bytes, no block without those before it."""

import random
from collections.abc import Sequence
from functools import cache

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, Block, Memory, PrefixStore, nbytes

# Paths in a tree of two branches at each block, so that sequences share prefixes. A key names the whole path.
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
Path = tuple[int, ...]


def keys_of(path: Path) -> list[bytes]:
    return [bytes(path[:end]) for end in range(1, len(path) + 1)]


@cache
def block_of(key: bytes) -> Block:
    """A block whose values and size follow from its key."""
    return ((torch.full((len(key), 4), float(sum(key))),), (), (torch.tensor(list(key), dtype=torch.uint8),))


def equal(one: Block, other: Block) -> bool:
    pairs = [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def keep(store: PrefixStore, keys: Sequence[bytes]) -> None:
    first = store.first_missing(keys)
    store.put(keys, first, [block_of(key) for key in keys[first:]])


def store_of(*budgets: int) -> PrefixStore:
    """A store with a tier of each of these bytes."""
    return PrefixStore([Memory(f"tier {number}", budget) for number, budget in enumerate(budgets)])


class StoreMachine(RuleBasedStateMachine):
    """Sequences are kept, found, and kept late: with blocks before theirs evicted meanwhile."""

    @initialize(budgets=st.lists(st.integers(0, 400), max_size=3))
    def begin(self, budgets: list[int]) -> None:
        self.store, self.ever = store_of(*budgets), set[bytes]()

    @rule(path=PATHS)
    def keep(self, path: Path) -> None:
        keep(self.store, keys_of(path))
        self.ever |= set(keys_of(path))

    @rule(path=PATHS, others=st.lists(PATHS, max_size=3))
    def keep_late(self, path: Path, others: list[Path]) -> None:
        keys = keys_of(path)
        first = self.store.first_missing(keys)
        for other in others:
            self.keep(other)
        self.store.put(keys, first, [block_of(key) for key in keys[first:]])
        self.ever |= set(keys)

    @rule(path=PATHS)
    def find(self, path: Path) -> None:
        keys = keys_of(path)
        before = self.store.hits + self.store.misses
        found = self.store.find(keys)
        assert all(equal(block, block_of(key)) for block, key in zip(found, keys, strict=False))
        assert len(found) == len(keys) or keys[len(found)] not in self.store
        assert self.store.hits + self.store.misses - before == len(keys) * BLOCK_TOKENS

    @invariant()
    def within_budget_and_in_chains(self) -> None:
        for tier in self.store.tiers:
            here = [key for key in self.ever if key in tier]
            assert tier.nbytes == sum(nbytes(block_of(key)) for key in here) <= tier.max_bytes
        here = [key for key in self.ever if key in self.store]
        assert all(key[:-1] in here for key in here if len(key) > 1)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=20)


def test_the_budget_holds_after_ten_thousand_random_requests() -> None:
    source, store = random.Random(5), store_of(10_000, 20_000)
    for _ in range(10_000):
        keys = keys_of(tuple(source.randrange(3) for _ in range(source.randint(1, 12))))
        store.find(keys)
        keep(store, keys)
        assert all(tier.nbytes <= tier.max_bytes for tier in store.tiers)
    assert store.misses and all(tier.counts.hits and tier.counts.evictions for tier in store.tiers)


def test_what_was_used_last_stays_and_of_the_rest_the_ends_go_first() -> None:
    old, new = keys_of((0, 0, 0)), keys_of((1, 1, 1))
    store = store_of(sum(nbytes(block_of(key)) for key in (*old, *new)))
    keep(store, new)
    keep(store, old)
    assert len(store.find(new)) == 3
    keep(store, keys_of((1, 0)))
    assert [key in store for key in old] == [True, True, False]
    assert all(key in store for key in new)
