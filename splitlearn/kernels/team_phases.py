"""What the threads of a team (kernels/thread_team.py) do together, in compiled code: products (kernels/block_matmul.py)
and attention (kernels/decode_attention.py) of one row, each a phase of which both take shares.

Only what computes by it should import this, since that loads LLVM.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from splitlearn.kernels.block_format import LANES
from splitlearn.kernels.block_matmul import multiply
from splitlearn.kernels.decode_attention import attend_arrays
from splitlearn.kernels.jit import called, compiled
from splitlearn.kernels.thread_team import ARGUMENTS, CLOSED, DONE, FAILED, NUMBER_AT, OPEN, WORK

# What a phase does, and the others of its arguments.
KIND, IN, OUT, N, BLOCKS, BLOCKS_BYTES, BITS, WIDTH = range(8)
KEYS, VALUES, GROUPS, CAPACITY, HEAD_SIZE, START, LENGTH, SCALE, N_ARGUMENTS = range(4, 13)
MULTIPLY, ATTEND = range(2)
# So often a helper looks in vain before it gives a step up, some tenths of a millisecond: the leader has no core, then.
PATIENCE = 400_000
FLOAT, BYTE, NUMBER = numba.types.float32, numba.types.uint8, numba.types.int64
KIND_OF_WORK, WORKED = NUMBER(numba.types.CPointer(NUMBER), NUMBER, NUMBER), 1


@compiled
def help_out(memory: Any, shares: Any) -> Any:
    """Take shares of what the leader opens, until it says that no more will come. How often it looked in vain, and
    once."""
    looked = 0
    while looked <= PATIENCE:
        found, looked = _load(memory, OPEN), looked + 1
        if found & CLOSED == CLOSED:
            return looked
        if found & CLOSED < shares and _one_more_than(memory, OPEN, found):
            _do(memory, found & CLOSED, shares)
            looked = 0
    return looked


@numba.njit  # type: ignore[untyped-decorator]
def floats(address: Any, shape: Any) -> Any:
    """The array of float32 of that shape at an address."""
    return numba.carray(_at(address, FLOAT), shape)


@numba.njit  # type: ignore[untyped-decorator]
def product(memory: Any, shares: Any, blocks: Any, begin: Any, end: Any, bits: Any, x: Any, out: Any) -> None:
    """As `multiply` for one row, of `blocks` from `begin` to `end`, to all columns of `out`."""
    given = memory[ARGUMENTS:]
    given[KIND], given[IN], given[OUT] = MULTIPLY, x.ctypes.data, out.ctypes.data
    given[BLOCKS], given[BLOCKS_BYTES], given[BITS] = np.int64(blocks.ctypes.data) + begin, end - begin, bits
    given[WIDTH], given[N] = x.shape[1], out.shape[1]
    _lead(memory, shares)


@numba.njit  # type: ignore[untyped-decorator]
def attention(
    memory: Any,
    shares: Any,
    query: Any,
    keys: Any,
    values: Any,
    shape: Any,
    start: Any,
    length: Any,
    scale: Any,
    out: Any,
) -> None:
    """As `attend_arrays` for one token: of `query`, whose first columns are [1, heads * size], to `out` of that shape.
    `keys` and `values` are addresses of arrays of `shape` (groups, capacity, size)."""
    given = memory[ARGUMENTS:]
    given[KIND], given[IN], given[OUT] = ATTEND, query.ctypes.data, out.ctypes.data
    given[KEYS], given[VALUES], given[START], given[LENGTH] = keys, values, start, length
    given[GROUPS], given[CAPACITY], given[HEAD_SIZE] = shape
    given[N], given[SCALE] = out.shape[1], np.float64(scale).view(np.int64)
    _lead(memory, shares)


@numba.njit  # type: ignore[untyped-decorator]
def _lead(memory: Any, shares: Any) -> None:
    """Do the phase whose arguments are there, with whoever helps. Raises MemoryError."""
    _store(memory, DONE, 0)
    _store(memory, FAILED, 0)
    found = ((_load(memory, OPEN) >> NUMBER_AT) + 1) << NUMBER_AT
    _store(memory, OPEN, found)
    while found & CLOSED < shares:
        if _one_more_than(memory, OPEN, found):
            _do(memory, found & CLOSED, shares)
        found = _load(memory, OPEN)
    while _load(memory, DONE) < shares:
        pass
    if _load(memory, FAILED):
        raise MemoryError


@numba.njit  # type: ignore[untyped-decorator]
def _do(memory: Any, share: Any, shares: Any) -> None:
    """A share that was taken."""
    if _called(memory, share, shares) != WORKED:
        _one_more(memory, FAILED)
    _one_more(memory, DONE)


@numba.njit  # type: ignore[untyped-decorator]
def _columns(given: Any, share: Any, shares: Any) -> Any:
    """Where the columns of a share begin and end."""
    pieces = given[N] // LANES if given[KIND] == MULTIPLY else given[GROUPS]
    each = given[N] // pieces
    return pieces * share // shares * each, pieces * (share + 1) // shares * each


@numba.njit  # type: ignore[untyped-decorator]
def _multiply(given: Any, begin: Any, end: Any) -> None:
    blocks = numba.carray(_at(given[BLOCKS], BYTE), (given[BLOCKS_BYTES],))
    x, out = floats(given[IN], (1, given[WIDTH])), floats(given[OUT], (1, given[N]))
    multiply(blocks, given[BITS], x, out, begin, end)


@numba.njit  # type: ignore[untyped-decorator]
def _attend(given: Any, begin: Any, end: Any) -> None:
    size, capacity, width = given[HEAD_SIZE], given[CAPACITY], given[N] // given[GROUPS]
    shape, kept = (1, (end - begin) // size, size), ((end - begin) // width, capacity, size)
    query, out = floats(given[IN] + 4 * begin, shape), floats(given[OUT] + 4 * begin, shape)
    before = 4 * (begin // width) * capacity * size
    keys, values = floats(given[KEYS] + before, kept), floats(given[VALUES] + before, kept)
    starts, lengths = np.array([given[START]]), np.array([given[LENGTH]])
    attend_arrays(query, keys, values, starts, lengths, np.int64(given[SCALE]).view(np.float64), out)


@intrinsic  # type: ignore[untyped-decorator]
def _at(typing: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to a number of that kind."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(kind.instance_type)(address, kind), generate


@called(KIND_OF_WORK)
def work(arguments: Any, share: Any, shares: Any) -> Any:
    """A share of a phase. Both call it by its address, which is in the team's memory, so that it is compiled once and
    not into each of them. WORKED; numba gives 0 where something is raised, which is what there is no memory for."""
    given = numba.carray(arguments, (N_ARGUMENTS,))
    begin, end = _columns(given, share, shares)
    if begin < end and given[KIND] == MULTIPLY:
        _multiply(given, begin, end)
    elif begin < end:
        _attend(given, begin, end)
    return WORKED


@intrinsic  # type: ignore[untyped-decorator]
def _called(typing: Any, memory: Any, share: Any, shares: Any) -> Any:
    """What `work` returns."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, given[0]).data
        number = ir.IntType(64)
        address = builder.load(builder.gep(data, [number(WORK)]))
        kind = ir.FunctionType(number, [number.as_pointer(), number, number])
        arguments = builder.gep(data, [number(ARGUMENTS)])
        return builder.call(builder.inttoptr(address, kind.as_pointer()), [arguments, *given[1:]])

    return NUMBER(memory, NUMBER, NUMBER), generate


def _place(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    return builder.gep(context.make_array(signature.args[0])(context, builder, given[0]).data, [given[1]])


@intrinsic  # type: ignore[untyped-decorator]
def _load(typing: Any, memory: Any, at: Any) -> Any:
    """What lies there; all that was written before it was, can be read."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load_atomic(_place(context, builder, signature, given), "acquire", 8)

    return NUMBER(memory, numba.types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _store(typing: Any, memory: Any, at: Any, value: Any) -> Any:
    """`value` lies there from now on, for others not before all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store_atomic(given[2], _place(context, builder, signature, given), "release", 8)
        return context.get_dummy_value()

    return numba.types.void(memory, numba.types.intp, NUMBER), generate


@intrinsic  # type: ignore[untyped-decorator]
def _one_more(typing: Any, memory: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.atomic_rmw("add", _place(context, builder, signature, given), ir.IntType(64)(1), "acq_rel")

    return NUMBER(memory, numba.types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _one_more_than(typing: Any, memory: Any, at: Any, found: Any) -> Any:
    """Whether `found` still lay there, which is one more now."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        more = builder.add(given[2], ir.IntType(64)(1))
        tried = builder.cmpxchg(_place(context, builder, signature, given), given[2], more, "acq_rel", "acquire")
        return builder.extract_value(tried, 1)

    return numba.types.boolean(memory, numba.types.intp, NUMBER), generate
