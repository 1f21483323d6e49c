"""Each flag of the registry keeps its word about fidelity, in both arms: alone, left out, all and none.

A fixed sequence of ids is fed (a prompt, then single tokens), so that the logits of one set of flags can be held
against another's step by step. The split arm's trunk is the stage that the server's engine runs.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from splitlearn.arms.compare import KINDS
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.registry import FLAGS, SIDES, Place, settings
from splitlearn.flags.selection import FlagSet, availability, parse
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.lab.logits import logits
from splitlearn.layers.block_linear import MANY_ROWS
from splitlearn.models.cut import layers_of
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from tests.conftest import TinyFactory
from tests.support.words import load_of, session_of

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
# Rounding in fp32 on this tiny model; the default model's figures are in docs/results/fidelity.md.
ROUNDING = 1e-3
ALLOWED = {"exact": 0.0, "rounding": ROUNDING}
# Of a lossy flag, as a part of the logits' own spread: 8 bits of a hidden state, and 4 of each random weight.
LOST = {"wire_dtype": 0.05, "weight_dtype": 0.5}

HERE = availability(dict.fromkeys(SIDES, Place("cpu", no_python_tokenizer="only one", has_compiler=True)))
ALL = parse("all", HERE).without("torch_compile")
AVAILABLE = [name for name in ALL.names() if not FLAGS[name].acts_when_sampling]
ROWS = [
    *((name, "alone", parse(name, HERE), FlagSet()) for name in AVAILABLE),
    *((name, "left out", ALL.without(name), ALL) for name in AVAILABLE),
]


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """Flags of process scope are set in this process here; set it back."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama", n_layers=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "how", "flags", "baseline"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_a_flag_changes_the_logits_no_more_than_it_says(
    files: ModelFiles, kind: Kind, name: str, how: str, flags: FlagSet, baseline: FlagSet
) -> None:
    before, fidelity = _logits(files, kind, baseline), FLAGS[name].fidelity
    difference = _logits(files, kind, flags) - before
    if fidelity == "lossy":
        assert difference.std() <= LOST[name] * before.std()
    else:
        assert difference.abs().max().item() <= ALLOWED[fidelity]


# What is lost on the wire, full has not lost.
ALIKE = list(dict.fromkeys([*(row[2].without("wire_dtype") for row in ROWS), ALL.without("wire_dtype"), FlagSet()]))


@pytest.mark.parametrize("flags", ALIKE, ids=lambda flags: ",".join(flags.names()))
def test_the_split_has_the_logits_of_the_full_model_to_the_bit(files: ModelFiles, flags: FlagSet) -> None:
    assert torch.equal(_logits(files, "full", flags), _logits(files, "split", flags))


def test_a_split_of_one_layer_a_stage_has_the_logits_of_the_full_model_to_the_bit(tiny_model: TinyFactory) -> None:
    cached, small = parse("use_cache", HERE), tiny_model("llama", n_layers=3)
    assert torch.equal(_logits(small, "full", cached), _logits(small, "split", cached))


def test_sides_that_disagree_about_the_cache_still_give_the_same_tokens(files: ModelFiles) -> None:
    reference = _logits(files, "split", parse("use_cache", HERE))
    for words in ("client:use_cache trunk:none", "client:none trunk:use_cache"):
        mixed = _logits(files, "split", parse(words, HERE))
        assert torch.equal(mixed.argmax(-1), reference.argmax(-1))
        assert (mixed - reference).abs().max().item() <= ROUNDING


def test_a_static_cache_gives_logits_within_rounding(files: ModelFiles) -> None:
    dynamic, static = parse("use_cache", HERE), parse("use_cache,cache=static", HERE)
    assert not torch.equal(_logits(files, "full", static), _logits(files, "full", FlagSet()))
    for kind in KINDS:
        assert (_logits(files, kind, static) - _logits(files, kind, dynamic)).abs().max().item() <= ROUNDING


def test_a_reserved_cache_gives_the_logits_of_a_dynamic_one_to_the_bit(files: ModelFiles) -> None:
    dynamic, reserved = parse("use_cache", HERE), parse("use_cache,cache", HERE)
    assert torch.equal(_logits(files, "full", reserved), _logits(files, "full", dynamic))


# To make inductor's code takes most of a minute, for one layer. The split arm runs what was traced as it is: what is
# prepared for inductor's code is in tests/stages/test_compiling.py, with each kind of cache and stage.
@pytest.mark.parametrize(("kind", "n_layers", "backend"), [("full", 1, "inductor"), ("split", 3, "eager")])
def test_compiled_stages_give_logits_within_rounding(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch, kind: Kind, n_layers: int, backend: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    # Its pool of processes would import torch in each, for one compiler that they wait for. It would compile and load a
    # file for each instruction set of the processor, to see that this can be done.
    quick = {"compile_threads": 1, "cpp.vec_isa_ok": True}
    counters.clear()
    small = tiny_model("llama", n_layers=n_layers)
    cached, compiled = parse("use_cache", HERE), parse("use_cache,torch_compile", HERE)
    with inductor.patch(quick):
        difference = (_logits(small, kind, compiled) - _logits(small, kind, cached)).abs().max().item()
    assert counters["stats"]["unique_graphs"] > 0
    assert difference <= ROUNDING


def test_a_load_without_a_second_copy_maps_the_file_and_the_other_does_not(files: ModelFiles) -> None:
    plan = SplitPlan.of(None, None, files.n_layers)
    for applied, mapped in ((frozenset({"low_cpu_mem_usage"}), True), (frozenset[str](), False)):
        stage = loading.load(files, loading.trunk_specs(plan), load_of(applied), PLACEMENT).stages[0]
        weight = next(stage.cut.module.parameters())
        assert _is_mapped(weight, files.weights) == mapped


_known: dict[tuple[str, Kind, FlagSet], torch.Tensor] = {}


def _logits(files: ModelFiles, kind: Kind, flags: FlagSet) -> torch.Tensor:
    """The logits [6, V] of a prompt of 7 tokens and of the 5 tokens after it, computed once for each set of flags."""
    at = (files.digest, kind, flags if kind == "split" else FlagSet(full=flags.full))
    if at not in _known:
        plan = SplitPlan.of(None, None, files.n_layers)
        _known[at] = logits(FixedInput(files, plan, kind, flags, tuple(range(3, 15)), 7, threads=1))
    return _known[at]


def _is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether `tensor` lies in memory that maps the file at `path`."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return rest[-1] == str(path)
    return False


@pytest.mark.parametrize(
    ("precision", "more", "short"),
    [(each, "", each) for each in ("highest", "high", "medium")] + [("medium", ",weight_dtype=int8", "highest")],
)
def test_one_token_or_few_of_blocks_are_computed_in_full_and_longer_steps_in_the_process_precision(
    files: ModelFiles, precision: str, more: str, short: str
) -> None:
    seen = list[tuple[int, str]]()
    flags = parse(f"low_cpu_mem_usage,use_cache,float32_matmul_precision={precision}{more}", HERE).full
    loading.prepare_process(settings(flags).process, 1)
    stage = loading.load(files, loading.full_specs(5), load_of(flags), PLACEMENT).stages[0]
    layers_of(stage.cut)[0].register_forward_pre_hook(
        lambda _, given: seen.append((given[0].shape[1], torch.get_float32_matmul_precision()))
    )
    session = stage.open(session_of(flags), 200)
    for position, tokens in ((0, 3), (3, 1), (4, 2), (6, MANY_ROWS)):
        stage.step([StageInput(session, position, torch.zeros(1, tokens, dtype=torch.long))])
    assert seen[-4:] == [(3, short), (1, "highest"), (2, short), (MANY_ROWS, precision)]
