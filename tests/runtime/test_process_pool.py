"""The pool of child processes against a plain model: a list of keys, least recently used first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from splitlearn.runtime.process_pool import ProcessPool, stop_all

KEYS = st.integers(0, 5)


class Process:
    """A process that does nothing; it counts its stops."""

    def __init__(self) -> None:
        self.dead = self.busy = False
        self.stops = 0

    def usable(self) -> bool:
        return not self.dead

    def idle(self) -> bool:
        return not self.busy

    def stop(self) -> None:
        self.dead = True
        self.stops += 1


class PoolMachine(RuleBasedStateMachine):
    """`order` is what the pool must hold; `started` is every process that there ever was."""

    processes = Bundle("processes")

    def __init__(self) -> None:
        super().__init__()
        self.limit = 3
        self.pool: ProcessPool[int, Process] = ProcessPool(lambda count: count < self.limit)
        self.order: dict[int, Process] = {}
        self.started: list[Process] = []

    def start(self) -> Process:
        self.started.append(Process())
        return self.started[-1]

    def used(self, key: int, process: Process) -> None:
        self.order.pop(key, None)
        self.order[key] = process

    def evicted(self) -> Process | None:
        key = next((key for key, process in self.order.items() if not process.busy), None)
        return None if key is None else self.order.pop(key)

    @rule(target=processes, key=KEYS)
    def obtain(self, key: int) -> Process:
        known = self.order.get(key)
        reused = known is not None and known.usable()
        if not reused:
            self.order.pop(key, None)
            while len(self.order) >= self.limit and self.evicted():
                pass
        found = self.pool.obtain(key, self.start)
        assert (found is known) == reused
        self.used(key, found)
        return found

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        known = self.order.get(key)
        found = self.pool.get(key)
        if known is None or not known.usable():
            assert found is None
            self.order.pop(key, None)
        else:
            assert found is known
            self.used(key, known)

    @rule(key=KEYS)
    def a_cancelled_start_adds_nothing(self, key: int) -> None:
        if key not in self.order:
            while len(self.order) >= self.limit and self.evicted():
                pass
            assert self.pool.obtain(key, lambda: None) is None

    @rule(process=processes, busy=st.booleans())
    def becomes(self, process: Process, busy: bool) -> None:
        process.busy = busy

    @rule(process=consumes(processes))
    def dies(self, process: Process) -> None:
        process.dead = True

    @rule(limit=st.integers(1, 6))
    def room_changes(self, limit: int) -> None:
        self.limit = limit

    @rule()
    def evict(self) -> None:
        assert self.pool.evict() is self.evicted()

    @rule()
    def prune(self) -> None:
        self.pool.prune()
        self.order = {key: process for key, process in self.order.items() if process.usable()}

    @precondition(lambda self: self.order)
    @rule()
    def remove_the_latest(self) -> None:
        process = self.order.pop(next(reversed(self.order)))
        self.pool.remove(process)
        self.pool.remove(process)
        assert process.stops == 0 or process.dead

    @rule()
    def close(self) -> None:
        left = list(self.order.values())
        self.pool.close()
        assert all(process.stops for process in left)
        self.order.clear()

    @invariant()
    def holds_what_the_model_holds_in_its_order(self) -> None:
        assert list(self.pool) == list(self.order.values())
        assert len(self.pool) == len(self.order)
        assert self.pool.latest == next(reversed(self.order), None)
        assert self.pool.has_room() == (len(self.order) < self.limit)

    @invariant()
    def stops_nothing_twice_and_nothing_that_it_holds(self) -> None:
        assert all(process.stops <= 1 for process in self.started)
        assert not any(process.stops for process in self.pool)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_a_start_raises_leaves_the_pool_as_it_was() -> None:
    pool: ProcessPool[str, Process] = ProcessPool(lambda count: True)
    kept = pool.obtain("kept", Process)

    def fails() -> Process:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        pool.obtain("new", fails)
    assert list(pool) == [kept]


def test_a_busy_process_is_not_evicted_and_the_new_one_starts_beside_it() -> None:
    pool: ProcessPool[str, Process] = ProcessPool(lambda count: count < 1)
    first = pool.obtain("first", Process)
    first.busy = True
    second = pool.obtain("second", Process)
    assert list(pool) == [first, second]
    assert pool.evict() is second
    assert pool.evict() is None


def test_cleared_processes_are_stopped_by_the_caller() -> None:
    pool: ProcessPool[str, Process] = ProcessPool(lambda count: True)
    pool.add("one", Process())
    pool.add("two", Process())
    members = pool.clear()
    assert [process.stops for process in members] == [0, 0]
    stop_all([member.stop for member in members])
    assert [process.stops for process in members] == [1, 1]
    assert len(pool) == 0
