"""A lock that one holds alone or several share: never both, and who wants it alone comes next."""

import threading
from concurrent.futures import ThreadPoolExecutor

from splitlearn.runtime.shared_lock import SharedLock
from tests.support.trunk import eventually


def test_several_share_and_one_is_alone() -> None:
    lock, inside, seen = SharedLock(), set[str](), list[set[str]]()

    def enter(name: str) -> None:
        with lock if name == "alone" else lock.shared():
            inside.add(name)
            seen.append(set(inside))
            inside.discard(name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter, ["alone", "a", "b", "c"] * 50))
    assert all("alone" not in each or each == {"alone"} for each in seen)
    assert not lock.locked()


def test_who_wants_it_alone_comes_before_those_who_would_share_it_next() -> None:
    lock, order = SharedLock(), list[str]()
    wants = threading.Event()

    def alone() -> None:
        wants.set()
        with lock:
            order.append("alone")

    def share() -> None:
        with lock.shared():
            order.append("shared")

    with ThreadPoolExecutor(2) as threads, lock.shared():
        first = threads.submit(alone)
        wants.wait()
        assert eventually(lambda: lock._wanted == 1)
        threads.submit(share)
        assert not lock.acquire(timeout_s=0)
        assert not first.done()
        order.append("first")
    assert order == ["first", "alone", "shared"]
