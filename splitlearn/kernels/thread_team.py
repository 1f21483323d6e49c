"""A team of threads that computes a step of one or a few tokens together (fork-join).

The leader runs the kernel (kernels/llama_decode.py). Each product and each attention in it is a phase, divided into
shares of whole columns. The leader describes the phase in a record and sets `left` to the number of its shares. Leader
and helpers take shares, each by one atomic decrement of `left`, and increment `done` after each. The leader continues
when all shares are done. So a phase waits only for shares that were taken: a helper without a core takes none, and the
leader computes them all. One thread sums a column, in one order, so that results do not depend on the number of
threads.

To wake a thread takes 50 us, longer than a phase. So helpers are woken once for a token, and poll `left` until `over`
is set. After SPINS polls without work a thread yields its core at each poll, so that there may be more threads than
cores. Why not numba's prange: docs/notes/tried.md.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from threading import Lock
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from splitlearn.kernels.atomics import atomic_add, atomic_load, atomic_store, field_pointer
from splitlearn.kernels.block_format import LANES
from splitlearn.kernels.block_matmul import multiply
from splitlearn.kernels.decode_attention import attend_arrays
from splitlearn.kernels.jit import called, compiled

# With one share per thread all would wait for the slowest. More than two cost more than they balance.
SHARES_PER_THREAD = 2
# Polls without work before a thread yields its core: about 20 us. The time between two phases is 1 us.
SPINS = 20_000
# Polls without work before a helper leaves the token: its leader has no core, or waits for the interpreter lock.
PATIENCE = SPINS + 1_000
# The pool starts a thread only if none is idle. Its default limit would be the number of cores plus four.
MAX_HELPERS = 1024
MULTIPLY, ATTEND = range(2)
# The arguments of a phase. Arrays are passed by address.
PRODUCT = np.dtype([(name, np.int64) for name in ("blocks", "size", "bits", "x", "rows", "width", "out", "n")])
ATTENTION = np.dtype(
    [(name, np.int64) for name in ("query", "rows", "width", "keys", "values", "groups", "capacity", "head_size")]
    + [("starts", np.int64), ("lengths", np.int64), ("scale", np.float64), ("out", np.int64), ("n", np.int64)]
)
# A team's record. Fields that different threads write are 128 bytes apart, since processors fetch two cache lines at
# once.
_GAP = (np.int64, 16)
TEAM = np.dtype(
    [
        ("before", *_GAP),
        ("left", np.int64),
        ("over", np.int64),
        ("behind_left", *_GAP),
        ("done", np.int64),
        ("failed", np.int64),
        ("behind_done", *_GAP),
        ("work", np.int64),  # the address of the function that computes a share
        ("most_shares", np.int64),
        ("shares", np.int64),
        ("kind", np.int64),
        ("product", PRODUCT),
        ("attention", ATTENTION),
        ("after", *_GAP),
    ]
)
FLOAT, BYTE, NUMBER = numba.types.float32, numba.types.uint8, numba.types.int64
RECORD = numba.from_dtype(TEAM)
KIND_OF_WORK, WORKED = NUMBER(numba.types.CPointer(RECORD), NUMBER), 1
_offer_core = numba.types.ExternalFunction("sched_yield", numba.types.int32())


class Team:
    """The threads of one stage: the leader, which is the thread inside `leading`, and `threads - 1` helpers of `pool`.

    `work` is the address of a compiled function of (record, share) that computes a share.
    """

    def __init__(self, threads: int, pool: Executor | None = None, work: int | None = None) -> None:
        self._work = work_on_share.address if work is None else work
        self._pool, self._record = pool, self._new_record(threads)
        self._alone = self._new_record(1).tobytes()
        self._helpers: list[Future[None] | None] = [None] * (threads - 1)
        self._busy = Lock()
        if self._helpers:
            help_out(self._record)  # compiles the function; outside a token it returns at once

    @contextmanager
    def leading(self) -> Iterator[NDArray[Any]]:
        """Wake the helpers and yield the team's record. While another thread leads them, the record has no helpers."""
        if not self._helpers or not self._busy.acquire(blocking=False):
            yield self.alone()
            return
        try:
            self._record["over"] = 0
            self._wake()
            yield self._record
        finally:
            self._record["over"] = 1
            self._busy.release()

    def alone(self) -> NDArray[Any]:
        """The record of a team without helpers."""
        return np.frombuffer(bytearray(self._alone), TEAM)  # takes 0.4 us; filling the fields would take 2

    def _wake(self) -> None:
        pool = helpers() if self._pool is None else self._pool
        for at, helper in enumerate(self._helpers):
            if helper is None or helper.done():  # otherwise it had no core since the last token
                with suppress(RuntimeError):  # no thread can be started
                    self._helpers[at] = pool.submit(help_out, self._record)

    def _new_record(self, threads: int) -> NDArray[Any]:
        record = np.zeros(1, TEAM)
        record["work"], record["over"] = self._work, 1
        record["most_shares"] = SHARES_PER_THREAD * threads if threads > 1 else 1
        return record


@cache
def helpers() -> ThreadPoolExecutor:
    """The pool of threads for kernels, apart from torch's."""
    return ThreadPoolExecutor(MAX_HELPERS, thread_name_prefix="helper")


@compiled
def help_out(record: Any) -> None:
    """Take shares of the leader's phases until the token is over."""
    team, looked = record[0], 0
    while looked < PATIENCE and not atomic_load(team, "over"):
        took = atomic_load(team, "left") > 0 and _take(team)
        looked = 0 if took else _pause(looked)


@numba.njit  # type: ignore[untyped-decorator]
def floats(address: Any, shape: Any) -> Any:
    """The float32 array of `shape` at an address."""
    return numba.carray(_at(address, FLOAT), shape)


@numba.njit  # type: ignore[untyped-decorator]
def product(team: Any, blocks: Any, begin: Any, end: Any, bits: Any, x: Any, out: Any) -> None:
    """`multiply` for the rows of `x`, with the bytes `blocks[begin:end]`, to all columns of `out`."""
    given, team.kind = team.product, MULTIPLY
    given.blocks, given.size, given.bits = np.int64(blocks.ctypes.data) + begin, end - begin, bits
    given.x, given.out, given.n = x.ctypes.data, out.ctypes.data, out.shape[1]
    given.rows, given.width = x.shape
    _do_phase(team, out.shape[1] // LANES)


@numba.njit  # type: ignore[untyped-decorator]
def attention(
    team: Any, query: Any, addresses: Any, shape: Any, starts: Any, lengths: Any, scale: Any, out: Any
) -> None:
    """`attend_arrays` for some tokens. The first columns of `query` are [T, heads * size], the shape of `out`.
    `addresses` has those of keys and values, arrays of `shape` (groups, capacity, size)."""
    given, team.kind = team.attention, ATTEND
    given.query, given.keys, given.values = query.ctypes.data, addresses[0], addresses[1]
    given.rows, given.width = query.shape
    given.groups, given.capacity, given.head_size = shape
    given.starts, given.lengths, given.scale = starts.ctypes.data, lengths.ctypes.data, scale
    given.out, given.n = out.ctypes.data, out.shape[1]
    _do_phase(team, len(query) * shape[0])


@numba.njit  # type: ignore[untyped-decorator]
def _do_phase(team: Any, pieces: Any) -> None:
    """Compute the phase of the record, which has so many `pieces`, with the helpers. Raises MemoryError."""
    team.shares = min(team.most_shares, pieces)
    team.done, team.failed = 0, 0
    atomic_store(team, "left", team.shares)
    while _take(team):
        pass
    looked = 0
    while atomic_load(team, "done") < team.shares:
        looked = _pause(looked)
    if atomic_load(team, "failed"):
        raise MemoryError


@numba.njit  # type: ignore[untyped-decorator]
def _take(team: Any) -> Any:
    """Take a share and compute it. False if none is left."""
    share = atomic_add(team, "left", -1) - 1
    if share < 0:
        return False
    if _call_work(team, share) != WORKED:
        atomic_add(team, "failed", 1)
    atomic_add(team, "done", 1)
    return True


@numba.njit  # type: ignore[untyped-decorator]
def _pause(looked: Any) -> Any:
    """Count a poll without work: returns `looked` plus one. Yields the core after SPINS of them."""
    if looked >= SPINS:
        _offer_core()
    return looked + 1


@numba.njit  # type: ignore[untyped-decorator]
def _pieces(pieces: Any, share: Any, shares: Any) -> Any:
    """The pieces [begin, end) of a share."""
    return pieces * share // shares, pieces * (share + 1) // shares


@numba.njit  # type: ignore[untyped-decorator]
def _multiply(given: Any, share: Any, shares: Any) -> None:
    begin, end = _pieces(given.n // LANES, share, shares)
    blocks = numba.carray(_at(given.blocks, BYTE), (given.size,))
    x, out = floats(given.x, (given.rows, given.width)), floats(given.out, (given.rows, given.n))
    multiply(blocks, given.bits, x, out, begin * LANES, end * LANES)


@numba.njit  # type: ignore[untyped-decorator]
def _attend(given: Any, share: Any, shares: Any) -> None:
    """A piece is a group of heads of one row. Those of a row are computed in one call."""
    groups, size, capacity, columns = given.groups, given.head_size, given.capacity, given.n // given.groups
    starts = numba.carray(_at(given.starts, NUMBER), (given.rows,))
    lengths = numba.carray(_at(given.lengths, NUMBER), (given.rows,))
    piece, end = _pieces(given.rows * groups, share, shares)
    while piece < end:
        row, group = divmod(piece, groups)
        some = min(groups - group, end - piece)
        shape, kept, before = (1, some * columns // size, size), (some, capacity, size), 4 * group * capacity * size
        query = floats(given.query + 4 * (row * given.width + group * columns), shape)
        out = floats(given.out + 4 * (row * given.n + group * columns), shape)
        keys, values = floats(given.keys + before, kept), floats(given.values + before, kept)
        own = slice(row, row + 1)
        attend_arrays(query, keys, values, starts[own], lengths[own], given.scale, out)
        piece += some


@intrinsic  # type: ignore[untyped-decorator]
def _at(typing: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to a number of type `kind`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(kind.instance_type)(address, kind), generate


@called(KIND_OF_WORK)
def work_on_share(record: Any, share: Any) -> Any:
    """Compute a share of the current phase, and return WORKED. After an exception (MemoryError) numba returns 0.

    Leader and helpers call it by its address in the record, so that it is compiled once, not into each of them.
    """
    team = numba.carray(record, (1,))[0]
    if team.kind == MULTIPLY:
        _multiply(team.product, share, team.shares)
    else:
        _attend(team.attention, share, team.shares)
    return WORKED


@intrinsic  # type: ignore[untyped-decorator]
def _call_work(typing: Any, team: Any, share: Any) -> Any:
    """Call the team's `work` for a share, and return its result."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number, record = ir.IntType(64), given[0].type
        address = builder.load(field_pointer(builder, given[0], team, "work"))
        kind = ir.FunctionType(number, [record, number])
        return builder.call(builder.inttoptr(address, kind.as_pointer()), given)

    return NUMBER(team, NUMBER), generate
