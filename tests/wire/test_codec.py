"""Tensors as bytes and back, and the checks before anything is allocated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import InputError, TrunkFailed, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.wire import MAX_MESSAGE_BYTES, MAX_TENSOR_BYTES, codec, status
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import BLOCK, Int8Blocks, Plain, Rows, converted
from tests.support.trunk import RAW, encoded

DTYPES = list(codec.DTYPES.values())
HIDDEN = 6


def random_hidden(tokens: int, dtype: torch.dtype = torch.float32, size: int = HIDDEN) -> torch.Tensor:
    return torch.randn(1, tokens, size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_bit_for_bit_in_every_dtype(dtype: torch.dtype) -> None:
    x, rows = random_hidden(5, dtype), Plain(dtype)
    x[0, 0, :3] = torch.tensor([math.inf, -math.inf, -0.0])
    message = pb.Tensor.FromString(encoded(x, rows).SerializeToString())
    assert codec.check(message, rows, HIDDEN) == 5
    back = rows.from_bytes(message.data, HIDDEN)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_a_tensor_that_is_not_contiguous_is_sent_in_its_own_order() -> None:
    x = torch.randn(1, HIDDEN, 4).transpose(1, 2)
    assert torch.equal(RAW.from_bytes(RAW.to_bytes(x), HIDDEN), x)


@pytest.mark.parametrize("rows", [*map(Plain, DTYPES), Int8Blocks()], ids=str)
def test_a_session_reads_each_message_as_it_is_by_itself(rows: Rows) -> None:
    read = rows.reader(HIDDEN)
    for tokens in (3, 1, 1, 2, 1):
        data = rows.to_bytes(random_hidden(tokens))
        assert torch.equal(read(data), rows.from_bytes(data, HIDDEN))


@pytest.mark.parametrize("rows", [RAW, Int8Blocks()], ids=str)
def test_a_decoded_tensor_can_be_written_to(rows: Rows) -> None:
    back = rows.from_bytes(rows.to_bytes(random_hidden(2)), HIDDEN)
    back.add_(1)
    assert back.isfinite().all()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 576])
def test_int8_rows_are_off_by_less_than_a_step_of_their_block(size: int) -> None:
    rows, x = Int8Blocks(), random_hidden(7, size=size)
    x[0, 3] *= 1e6
    x[0, 4] = 0
    x[0, 5, -1] = 1e4
    data = rows.to_bytes(x)
    assert len(data) == 7 * rows.row_bytes(size)
    back = rows.from_bytes(data, size)
    for start in range(0, size, BLOCK):
        block, found = x[0, :, start : start + BLOCK], back[0, :, start : start + BLOCK]
        assert ((block - found).abs() <= 0.75 * block.abs().amax(-1, keepdim=True) / 127 * 1.01).all()


NORMAL = st.one_of(st.just(0.0), st.floats(2**-100, 2**100, width=32), st.floats(-(2**100), -(2**-100), width=32))


@given(st.lists(NORMAL, min_size=70, max_size=70))
def test_int8_rows_sent_once_more_are_the_same_bytes(values: list[float]) -> None:
    rows = Int8Blocks()
    data = rows.to_bytes(torch.tensor(values).view(1, 1, -1))
    assert rows.to_bytes(rows.from_bytes(data, 70)) == data


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_int8_rows_do_not_hide_what_is_no_number(value: float) -> None:
    rows, x = Int8Blocks(), random_hidden(3, size=130)
    x[0, 1, 129] = value
    with pytest.raises(InputError, match="position 8"):
        codec.check_finite(rows.from_bytes(rows.to_bytes(x), 130), 7)


def test_int8_rows_of_the_default_model_take_less_than_27_percent_of_float32_message_included() -> None:
    rows, x = Int8Blocks(), random_hidden(1, size=576)
    step = pb.Step(sequence_id=1, step_id=70, position=90, hidden=encoded(x, rows))
    assert len(pb.ClientMessage(step=step).SerializeToString()) <= 0.27 * 576 * 4


def wrong(**changes: object) -> pb.Tensor:
    """Two float32 tokens, but for `changes`."""
    right: dict[str, object] = {"dtype": pb.FLOAT32, "shape": (1, 2, HIDDEN), "data": bytes(2 * HIDDEN * 4)}
    return pb.Tensor(**{**right, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "field", "right"),
    [
        (wrong(dtype=pb.BFLOAT16), "tensor.dtype", "float32"),
        (wrong(dtype=pb.INT8_BLOCKS), "tensor.dtype", "float32"),
        (wrong(dtype=pb.DTYPE_UNSPECIFIED), "tensor.dtype", "float32"),
        (wrong(dtype=99), "tensor.dtype", "float32"),
        (wrong(shape=()), "tensor.shape", f"[1, tokens, {HIDDEN}]"),
        (wrong(shape=(2, HIDDEN)), "tensor.shape", f"[1, tokens, {HIDDEN}]"),
        (wrong(shape=(2, 1, HIDDEN)), "tensor.shape", f"[1, tokens, {HIDDEN}]"),
        (wrong(shape=(1, 0, HIDDEN), data=b""), "tensor.shape", "at least one token"),
        (wrong(shape=(1, 2, HIDDEN + 1)), "tensor.shape", f"[1, tokens, {HIDDEN}]"),
        (wrong(shape=(1, 2, HIDDEN, 1)), "tensor.shape", f"[1, tokens, {HIDDEN}]"),
        (wrong(shape=(1, 3, HIDDEN)), "tensor.data", "72 bytes"),
        (wrong(shape=(1, 2**32 - 1, HIDDEN)), "tensor.data", f"{(2**32 - 1) * HIDDEN * 4} bytes"),
        (wrong(data=b""), "tensor.data", "48 bytes"),
        (wrong(data=bytes(2 * HIDDEN * 4 + 1)), "tensor.data", "48 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused_with_what_would_be_right(
    message: pb.Tensor, field: str, right: str
) -> None:
    with pytest.raises(InputError) as caught:
        codec.check(message, RAW, HIDDEN)
    assert caught.value.field == field
    assert right in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, HIDDEN - 1), (4, 3)], ids=str)
def test_a_number_that_is_not_finite_is_named_with_its_position(
    dtype: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    x = random_hidden(5, dtype)
    x[0, place[0], place[1]] = value
    x[0, 4, HIDDEN - 1] = -value
    with pytest.raises(InputError, match=rf"tensor\.data: '{value} at position {100 + place[0]}' .*finite numbers"):
        codec.check_finite(x, 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_whose_sum_is_not_pass(dtype: torch.dtype) -> None:
    x = torch.full((1, 3, HIDDEN), torch.finfo(dtype).max, dtype=dtype)
    assert not x.sum().isfinite()
    codec.check_finite(x, 0)
    codec.check_finite(-x, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_long_prompt_fits_into_a_message(dtype: torch.dtype) -> None:
    row = 576 * dtype.itemsize
    size = codec.part_bytes(row)
    assert size % row == 0 and size + row > MAX_TENSOR_BYTES >= size
    part = pb.Tensor(**codec.fields(bytes(size), Plain(dtype), 576))
    step = pb.Step(sequence_id=2**32 - 1, step_id=2**32 - 1, position=2**32 - 1, hidden=part, more=True)
    assert len(pb.ClientMessage(step=step).SerializeToString()) <= MAX_MESSAGE_BYTES


def test_a_part_is_no_more_than_the_other_end_takes() -> None:
    assert codec.part_bytes(100, limit=250) == 200
    assert codec.part_bytes(100, limit=10 * MAX_TENSOR_BYTES) <= MAX_TENSOR_BYTES


def test_a_token_that_is_larger_than_a_part_is_not_cut() -> None:
    assert codec.part_bytes(MAX_TENSOR_BYTES + 4) == MAX_TENSOR_BYTES + 4


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("position", 7, "0"), "INVALID_ARGUMENT"),
        (TrunkRefused("other model"), "FAILED_PRECONDITION"),
        (TrunkFull("full"), "RESOURCE_EXHAUSTED"),
        (TrunkUnavailable("lost"), "UNAVAILABLE"),
        (TrunkFailed("broke"), "INTERNAL"),
        (ZeroDivisionError("nobody foresaw it"), "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_its_status(error: Exception, code: str) -> None:
    assert status.code_of(error).name == code


def test_a_message_of_any_length_is_made_short_enough_to_arrive_with_both_ends() -> None:
    short = status.shorten("model is right, not 'x" + "x" * 100_000 + "'; try again")
    assert len(short) < 4096
    assert short.startswith("model is right")
    assert short.endswith("try again")
    assert status.shorten("as it is") == "as it is"


@pytest.mark.parametrize("form", [Int8Blocks(), Plain(torch.bfloat16)], ids=str)
def test_the_largest_finite_numbers_of_float16_stay_finite_and_infinite_ones_do_not(form: Rows) -> None:
    x = torch.full((1, 2, 64), 65504.0, dtype=torch.float16)
    back = converted(form.from_bytes(form.to_bytes(x), 64), torch.float16)
    assert torch.allclose(back, x, rtol=0.01)
    x[0, 1, 3] = torch.inf
    back = converted(form.from_bytes(form.to_bytes(x), 64), torch.float16)
    assert codec.where_not_finite(back) is not None
