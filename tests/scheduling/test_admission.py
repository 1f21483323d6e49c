"""Who comes in next, for any sessions: nobody passes for ever, holders share, and what is free is used."""

import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.errors import InputError, TrunkFull
from splitlearn.kvcache.pool import KVPool, KVShape
from splitlearn.scheduling.admission import OVERTAKES, Admission, Reservation, Ticket, choose, note_passed
from tests.support.trunk import eventually

BLOCK = 4
tickets = st.builds(Ticket, st.integers(1, 8), st.sampled_from("abc"), passed=st.integers(0, OVERTAKES))
batches = st.builds(Ticket, st.integers(1, 8), batch=st.just(True), passed=st.integers(0, OVERTAKES))


def _pool(blocks: int) -> KVPool:
    return KVPool([(KVShape(1, 1), KVShape(1, 1))], blocks, BLOCK, torch.float32, torch.device("cpu"))


def _stays(gone: object) -> bool:
    return True


def _waits(admission: Admission, count: int) -> bool:
    return admission.waiting == count


@settings(deadline=None)
@given(st.lists(tickets, max_size=8), st.integers(0, 8), st.dictionaries(st.sampled_from("abc"), st.integers(0, 60)))
def test_whoever_comes_in_fits_and_nobody_is_passed_too_often(
    queue: list[Ticket], room: int, held: dict[str, int]
) -> None:
    chosen = choose(queue, held, lambda ticket: ticket.tokens <= room, now=1.0, keep_s=10.0)
    due = [ticket for ticket in queue if ticket.passed >= OVERTAKES]
    if chosen is None:
        assert due or all(ticket.tokens > room for ticket in queue)
        return
    assert chosen.tokens <= room
    if due:
        assert chosen is due[0]
    else:
        fitting = [ticket for ticket in queue if ticket.tokens <= room]
        assert held.get(chosen.holder, 0) == min(held.get(ticket.holder, 0) for ticket in fitting)
        alike = [ticket for ticket in fitting if held.get(ticket.holder, 0) == held.get(chosen.holder, 0)]
        assert chosen is alike[0]


def test_room_is_kept_after_so_many_have_passed_but_not_for_ever() -> None:
    large, queue = Ticket(8), [Ticket(1) for _ in range(OVERTAKES + 2)]
    queue.insert(0, large)
    fits = lambda ticket: ticket.tokens <= 7  # noqa: E731
    for now in range(OVERTAKES):
        chosen = choose(queue, {}, fits, float(now), keep_s=10.0)
        assert chosen is not None and chosen is not large
        note_passed(queue, chosen, float(now))
        queue.remove(chosen)
    assert choose(queue, {}, fits, 9.0, keep_s=10.0) is None
    assert choose(queue, {}, lambda ticket: True, 9.0, keep_s=10.0) is large
    after = choose(queue, {}, fits, 100.0, keep_s=10.0)
    assert after is not None and after is not large


def test_a_session_that_needs_all_blocks_keeps_nobody_out_of_those_that_are_free() -> None:
    admission = Admission(_pool(8), 64, 32)
    small = admission.acquire(BLOCK, 5, _stays)
    with ThreadPoolExecutor(1) as thread:
        large = thread.submit(admission.acquire, 8 * BLOCK, 600, _stays)
        assert eventually(lambda: admission.waiting == 1)
        others = [admission.acquire(BLOCK, 0.0, _stays) for _ in range(7)]
        for reservation in (small, *others):
            admission.release(reservation)
        reservation = large.result()
    assert reservation.slot is not None and reservation.slot.tokens == 8 * BLOCK


def test_the_holder_with_fewer_sessions_comes_in_first() -> None:
    admission = Admission(_pool(64), 4, 32)
    reservations = [admission.acquire(BLOCK, 5, _stays, "many") for _ in range(4)]
    order: list[str] = []
    noted = threading.Lock()

    def enter(holder: str) -> None:
        reservation = admission.acquire(BLOCK, 60, _stays, holder)
        with noted:
            order.append(holder)
        admission.release(reservation)

    with ThreadPoolExecutor(3) as threads:
        for count, holder in enumerate(("many", "many", "one"), 1):
            threads.submit(enter, holder)
            assert eventually(partial(_waits, admission, count))
        admission.release(reservations.pop())
        assert eventually(lambda: len(order) == 3)
    assert order[0] == "one"


def test_a_full_queue_rejects_the_last_of_the_holder_with_most_in_it() -> None:
    admission = Admission(_pool(1), 64, 2)
    reservation = admission.acquire(BLOCK, 5, _stays, "many")
    with ThreadPoolExecutor(3) as threads:
        first, second = (threads.submit(admission.acquire, BLOCK, 60, _stays, "many") for _ in range(2))
        assert eventually(lambda: admission.waiting == 2)
        one = threads.submit(admission.acquire, BLOCK, 60, _stays, "one")
        (gone,) = wait((first, second), 60, FIRST_COMPLETED).done
        with pytest.raises(TrunkFull, match="full"):
            gone.result()
        with pytest.raises(TrunkFull, match="waiting already"):
            admission.acquire(BLOCK, 60, _stays, "many")
        admission.release(reservation)
        for entered in as_completed({first, second, one} - {gone}):
            admission.release(entered.result())
    assert admission.sessions == admission.waiting == admission.pool.blocks_used == 0


@given(st.lists(tickets | batches, max_size=8), st.integers(0, 8))
def test_batch_sessions_keep_no_other_out(queue: list[Ticket], room: int) -> None:
    chosen = choose(queue, {}, lambda ticket: ticket.tokens <= room, now=1.0, keep_s=10.0)
    due = [ticket for ticket in queue if ticket.passed >= OVERTAKES]
    if chosen is not None and chosen.batch and chosen not in due:
        assert not any(ticket.tokens <= room for ticket in queue if not ticket.batch)
    if chosen is None:
        assert any(not ticket.batch for ticket in due) or all(ticket.tokens > room for ticket in queue)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2 * BLOCK)), max_size=30), st.randoms())
def test_one_half_of_the_memory_is_never_taken_by_batch_sessions(asked: list[tuple[bool, int]], order: Random) -> None:
    """Whatever batch ones hold: once the others have gone, a session of half the memory gets in at once."""
    admission, held = Admission(_pool(8), 64, 32), list[Reservation]()
    for batch, tokens in asked:
        if held and order.random() < 0.4:
            admission.release(held.pop(order.randrange(len(held))))
        with suppress(TrunkFull):
            held.append(admission.acquire(tokens, 0.0, _stays, batch=batch))
    for reservation in [each for each in held if not each.batch]:
        admission.release(reservation)
    assert admission.acquire(4 * BLOCK, 0.0, _stays).slot is not None


def test_a_batch_session_that_its_half_cannot_hold_is_refused_by_name() -> None:
    admission = Admission(_pool(8), 64, 32)
    with pytest.raises(InputError, match="at most 16 tokens: server.kv_bytes has room for no more batch requests"):
        admission.acquire(4 * BLOCK + 1, 0.0, _stays, batch=True)
