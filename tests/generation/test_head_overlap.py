"""A step that is begun with the first part of the logits: the tokens are those without it, whatever was guessed."""

from collections import deque

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from splitlearn.generation.head_overlap import OverlapPolicy
from splitlearn.generation.speculation import TIMES, Record
from splitlearn.metrics import RunMetrics
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
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
HEADS = (*FAMILIES, "opt", "bloom", "gpt_neox", "ctrl", "cohere", "granite", "olmo")
PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that can be is begun early: random weights make most guesses wrong, which would not pay."""
    monkeypatch.setattr(OverlapPolicy, "pays", lambda self: True)


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
    known = OverlapPolicy(Record(100 * right, 100), deque([rest_s] * TIMES), deque([step_s] * TIMES))
    assert known.pays() is pays


def test_a_step_is_begun_early_before_the_times_are_known() -> None:
    assert OverlapPolicy().pays()


def _tail(files: ModelFiles, own: frozenset[str], layers: int = 0) -> loading.LoadedStages:
    """A client's last `layers` and LM head."""
    n = files.n_layers
    specs = [*([loading.StageSpec("top", n - layers, n)] if layers else []), loading.StageSpec("top", n, n, last=True)]
    return loading.load(files, specs, load_of(own), PLACEMENT)


def _logits(loaded: loading.LoadedStages, x: torch.Tensor, own: frozenset[str], rows: int = 1) -> torch.Tensor:
    for stage in loaded.chain:
        x = stage.step([StageInput(stage.open(session_of(own), 8), 0, x, rows)])[0].x
    return x


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_in_parts_gives_the_logits_of_the_whole_one(
    tiny_model: TinyFactory, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PIECE_BYTES", 1)  # so small a head would be one piece
    files, own = tiny_model(family), KINDS[kind]
    head = _tail(files, own).head
    assert head is not None
    item = StageInput(head.open(session_of(own), 8), 0, hidden(files, 3))
    pending = head.logits_in_parts(item)
    assert pending is not None
    whole, parts = head.step([item])[0].x, pending.finish().x
    assert torch.equal(parts, whole)
    assert 0 < pending.first.shape[-1] < whole.shape[-1]
    assert torch.equal(pending.first, whole[..., : pending.first.shape[-1]])


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("layers", [0, 2])
def test_layers_and_the_head_apart_give_the_logits_of_one_stage(
    tiny_model: TinyFactory, family: str, layers: int
) -> None:
    files = tiny_model(family)
    loaded, spec = _tail(files, CACHED, layers), loading.StageSpec("bottom", 0, files.n_layers - layers, first=True)
    states = loading.load(files, [spec], load_of(CACHED), PLACEMENT).stages[0]
    whole = loading.load(files, loading.full_specs(files.n_layers), load_of(CACHED), PLACEMENT).stages[0]
    ids = torch.arange(4, 7)[None]
    for rows in (1, 3):
        x = states.step([StageInput(states.open(session_of(CACHED), 8), 0, ids)])[0].x
        full = whole.step([StageInput(whole.open(session_of(CACHED), 8), 0, ids, rows)])[0].x
        assert torch.equal(_logits(loaded, x, CACHED, rows), full)


def test_a_head_that_cannot_be_parted_says_so(tiny_model: TinyFactory) -> None:
    files, own = tiny_model("llama"), KINDS["onednn"]
    head = _tail(files, own).head  # its weights are one piece
    assert head is not None
    assert head.logits_in_parts(StageInput(head.open(session_of(own), 8), 0, hidden(files, 1))) is None
