"""A step that is begun with the first part of the logits: the tokens are those without it, whatever was guessed."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from splitlearn.generation.head_overlap import HeadStart
from splitlearn.generation.speculation import TIMES, Record
from splitlearn.generation.step_timing import Ledger
from splitlearn.kernels.block_format import BITS
from splitlearn.layers.block_linear import BlockLinear
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.metrics import RunMetrics
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.head import parted
from tests.conftest import TinyFactory
from tests.support.client import CACHED, client
from tests.support.proxy import proxy
from tests.support.trunk import TrunkHere, hidden, serve_here
from tests.support.words import load_of, session_of

TOKENS = 24
REQUEST = GenerationRequest("the quick brown fox jumps over the lazy dog and runs on", TOKENS, ignore_eos=True)
OVERLAP = frozenset({"head_overlap"})
KINDS = {
    "plain": CACHED,
    "reserved": CACHED | {"cache"},
    "medium": CACHED | {"float32_matmul_precision"},
    "onednn": CACHED | {"weight_prepack"},
    "blocks": CACHED | {"weight_prepack=blocks"},
    "int4": CACHED | {"weight_dtype"},
}
FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def here(files: ModelFiles) -> Iterator[TrunkHere]:
    with serve_here(files) as running:
        yield running


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that can be is begun early: random weights make most guesses wrong, which would not pay."""
    monkeypatch.setattr(HeadStart, "_pays", lambda self: True)


def _answer(files: ModelFiles, address: str, own: frozenset[str], request: GenerationRequest = REQUEST) -> RunMetrics:
    with client(files, address, own=own) as asking:
        return asking.ask(request)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_same_with_right_guesses_and_wrong_ones(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family)
    with serve_here(files) as running:
        for prompt in ("one two three", "a b c d e f g", REQUEST.prompt):
            request = GenerationRequest(prompt, TOKENS, ignore_eos=True)
            alone = _answer(files, running.address, CACHED, request)
            early = _answer(files, running.address, CACHED | OVERLAP, request)
            assert early.token_ids == alone.token_ids
            assert early.head_starts == TOKENS - 1 and alone.head_starts == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_for_every_kind_of_head(
    here: TrunkHere, files: ModelFiles, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PIECE_BYTES", 1)  # so small a head would be one piece
    alone = _answer(files, here.address, KINDS[kind])
    early = _answer(files, here.address, KINDS[kind] | OVERLAP)
    assert early.token_ids == alone.token_ids
    assert early.head_starts == TOKENS - 1 > early.head_starts_right > 0


@pytest.mark.usefixtures("always")
def test_the_ledger_sums_to_the_time_and_what_was_sent_in_vain_is_counted(here: TrunkHere, files: ModelFiles) -> None:
    alone, early = (_answer(files, here.address, own) for own in (CACHED, CACHED | OVERLAP))
    assert sum(early.ledger.values()) == pytest.approx(early.e2el_s, abs=1e-9)
    assert min(spent for name, spent in early.ledger.items() if name != "unattributed") >= 0
    vain = early.head_starts - early.head_starts_right
    assert vain > 0
    row = alone.decode_bytes_up / (TOKENS - 1)
    # A step that rolls back says so: a few bytes more.
    assert early.bytes_up - alone.bytes_up == pytest.approx(vain * row, rel=0.05)
    # An answer that the trunk gave up has no hidden state; one that was there before it was told has.
    down = alone.decode_bytes_down / (TOKENS - 1)
    assert 0 < early.bytes_down - alone.bytes_down <= 1.05 * vain * down


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 8, 12])
def test_a_trunk_that_is_lost_meanwhile_changes_no_token(here: TrunkHere, files: ModelFiles, at: int) -> None:
    wanted = _answer(files, here.address, CACHED).token_ids
    with proxy(here.address) as between, client(files, between.address, own=CACHED | OVERLAP) as asking:
        found = asking.ask(REQUEST, lambda token: between.cut() if token == at else None)
    assert found.token_ids == wanted
    assert len(found.recoveries) == 1


@pytest.mark.usefixtures("always")
def test_a_session_ends_in_order_with_a_step_under_way(here: TrunkHere, files: ModelFiles) -> None:
    with client(files, here.address, own=CACHED | OVERLAP) as asking:
        events = asking.stream(REQUEST)
        for _ in range(4):
            next(events)
        events.close()
        assert asking.stage.facts.peak_rss_bytes > 0
        assert asking.ask(REQUEST).n_tokens == TOKENS


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("own", "sampling"),
    [
        (CACHED - {"use_cache"}, SamplingParams()),
        (CACHED | {"prompt_lookup"}, SamplingParams()),
        (CACHED, SamplingParams(repetition_penalty=1.3)),
        (CACHED, SamplingParams(temperature=0.8, top_k=50, seed=7)),
    ],
)
def test_where_it_cannot_be_used_nothing_is_begun(
    here: TrunkHere, files: ModelFiles, own: frozenset[str], sampling: SamplingParams
) -> None:
    request = GenerationRequest(REQUEST.prompt, TOKENS, ignore_eos=True, sampling=sampling)
    found = _answer(files, here.address, own | OVERLAP, request)
    assert found.token_ids == _answer(files, here.address, own, request).token_ids
    assert found.head_starts == 0


@pytest.mark.usefixtures("always")
def test_nothing_is_begun_after_the_last_token(here: TrunkHere, files: ModelFiles) -> None:
    found = _answer(files, here.address, CACHED | OVERLAP, GenerationRequest(REQUEST.prompt, 1, ignore_eos=True))
    alone = _answer(files, here.address, CACHED, GenerationRequest(REQUEST.prompt, 1, ignore_eos=True))
    assert found.bytes_up == alone.bytes_up


def _head_start(right: float, rest_s: float, step_s: float) -> HeadStart:
    start = HeadStart([], Ledger(), ())
    start._record = Record(100 * right, 100)
    start._rests.extend([rest_s] * TIMES)
    start._steps.extend([step_s] * TIMES)
    return start


@pytest.mark.parametrize(
    ("right", "rest_s", "step_s", "pays"),
    [
        (0.95, 0.002, 0.010, True),
        (0.75, 0.002, 0.010, False),
        (0.95, 0.002, 0.100, False),
        (0.20, 0.009, 0.010, True),
        (1.00, 0.001, 1.000, True),
    ],
)
def test_a_step_is_begun_early_where_that_saves_time(right: float, rest_s: float, step_s: float, pays: bool) -> None:
    assert _head_start(right, rest_s, step_s)._pays() is pays


def test_a_step_is_begun_early_before_the_times_are_known() -> None:
    assert HeadStart([], Ledger(), ())._pays()


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head


@pytest.mark.parametrize("rows", [99, 160, 4096])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["plain", "onednn", *BITS])
def test_a_head_in_parts_gives_the_logits_of_the_whole_one(rows: int, biased: bool, kind: str | int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(rows, 64), torch.randn(rows) if biased else None
    pieces = [weight[begin : begin + 32].contiguous() for begin in range(0, rows, 32)]
    if isinstance(kind, int):
        head: nn.Module = BlockLinear(pieces, bias, kind)
    else:
        head = _plain(weight, bias) if kind == "plain" else PrepackedLinear(pieces, bias)
    x, told = torch.randn(1, 1, 64), list[torch.Tensor]()
    with torch.no_grad():
        unchanged = head(x)
    in_parts = parted(head)
    assert in_parts is not None
    with torch.no_grad():
        whole = head(x)
        with in_parts.telling(told.append):
            out = head(x)
            several = head(torch.randn(1, 3, 64))
        assert torch.equal(whole, unchanged) and several.shape == (1, 3, rows)
    assert torch.equal(out, whole)
    assert len(told) == 1 and 0 < told[0].shape[-1] < rows
    assert torch.equal(told[0], whole[..., : told[0].shape[-1]])


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "bloom", "gpt_neox", "ctrl"])
@pytest.mark.parametrize("layers", [0, 2])
def test_a_stage_that_tells_its_first_logits_gives_the_same(tiny_model: TinyFactory, family: str, layers: int) -> None:
    files = tiny_model(family)
    spec = loading.StageSpec("top", files.n_layers - layers, files.n_layers, last=True)
    stage = loading.load(files, [spec], load_of(CACHED), loading.Placement(torch.device("cpu"), torch.float32)).stages[
        0
    ]
    x, told = hidden(files, 1), list[torch.Tensor]()
    alone, telling = (
        stage.step([StageInput(stage.open(session_of(CACHED), 8), 0, x, early=early)])[0].x
        for early in (None, told.append)
    )
    assert torch.equal(alone, telling)
    assert len(told) == 1


def test_another_kind_of_head_is_left_as_it_is() -> None:
    assert parted(nn.Identity()) is None and parted(None) is None
    assert parted(BlockLinear([torch.randn(16, 64)], None, 4)) is None
