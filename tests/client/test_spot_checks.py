"""Spot checks of a trunk's answers: a wrong one is found, honest ones raise no alarm."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from splitlearn import config
from splitlearn.arms.spec import ArmSpec
from splitlearn.arms.worker_main import open_trunks
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.hop import hops_of
from splitlearn.errors import InputError
from splitlearn.events import Done, GenerationRequest, SpotCheckResult
from splitlearn.flags.selection import FlagSet
from splitlearn.layers.block_linear import in_one_memory
from splitlearn.models.cut import layers_of
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.layerwise import trunk_layer_by_layer
from splitlearn.stages.settings import LoadSettings
from splitlearn.stages.spot_checks import SpotChecks
from tests.conftest import TinyFactory
from tests.support.client import CACHED, Client, client
from tests.support.proxy import proxy
from tests.support.trunk import PLAN, TrunkHere, serve_here
from tests.support.words import session_of

SHARE = 0.02
TOKENS = 200


@contextmanager
def checking(files: ModelFiles, address: str, share: float = SHARE, trunk: frozenset[str] = CACHED) -> Iterator[Client]:
    """A client that checks this share of the trunk's answers."""
    with client(files, address, trunk=trunk) as asking:
        reference = partial(trunk_layer_by_layer, files, PLAN, torch.float32)
        asking.stage.checks = SpotChecks(share, PLAN, reference, torch.float32)
        yield asking


def ask(asking: Client, tokens: int = TOKENS, number: int = 0) -> SpotCheckResult:
    request = GenerationRequest(f"Why is the sky blue, question {number}?", max_new_tokens=tokens, ignore_eos=True)
    return asking.ask(request).spot_checks


@contextmanager
def changed(here: TrunkHere, change: Callable[[torch.nn.Module], Callable[[], object]]) -> Iterator[None]:
    """The server's last layer is changed for a `with` block; `change` returns what undoes it."""
    undo = change(layers_of(here.runtime.stage.cut)[-1])
    try:
        yield
    finally:
        undo()


def one_percent(layer: torch.nn.Module) -> Callable[[], object]:
    weight = layer.get_parameter("mlp.down_proj.weight")
    kept = weight.data
    weight.data = kept * 1.01
    return partial(setattr, weight, "data", kept)


def left_out(layer: torch.nn.Module) -> Callable[[], object]:
    def skip(module: object, inputs: tuple[Tensor, ...], output: object) -> Tensor:
        return inputs[0]

    return layer.register_forward_hook(skip).remove


def in_four_bits(layer: torch.nn.Module) -> Callable[[], object]:
    down = layer.get_parameter("mlp.down_proj.weight")
    path, was = "mlp.down_proj", layer.get_submodule("mlp.down_proj")
    layer.set_submodule(path, in_one_memory(4, [(down.shape[0], down.shape[1])])([down.data.contiguous()], None))
    return partial(layer.set_submodule, path, was)


@pytest.mark.parametrize("change", [one_percent, left_out, in_four_bits])
def test_a_trunk_that_computes_other_layers_is_found_within_200_tokens_at_two_percent(
    here: TrunkHere, files: ModelFiles, change: Callable[[torch.nn.Module], Callable[[], object]]
) -> None:
    with changed(here, change), checking(files, here.address) as asking:
        found = ask(asking)
    assert found.mismatches and found.checked == TOKENS * SHARE
    assert all(each.layers == (PLAN.start, PLAN.end) and each.error > each.allowed for each in found.mismatches)


def test_no_honest_answer_raises_an_alarm_beside_those_of_others(here: TrunkHere, files: ModelFiles) -> None:
    """The server puts steps of all four clients into one forward."""
    with ExitStack() as clients, ThreadPoolExecutor(3) as threads:
        others = [clients.enter_context(client(files, here.address)) for _ in range(3)]
        asking = clients.enter_context(checking(files, here.address, 1))
        busy = [threads.submit(ask, other, 100, number) for number, other in enumerate(others)]
        found = ask(asking, 100)
        assert all(each.result() == SpotCheckResult() for each in busy)
    assert (found.checked, found.mismatches) == (100, ())


def test_checks_that_begin_at_once_load_their_layers_without_each_other(here: TrunkHere, files: ModelFiles) -> None:
    with ExitStack() as clients, ThreadPoolExecutor(8) as threads:
        asking = [clients.enter_context(checking(files, here.address, 1)) for _ in range(8)]
        found = list(threads.map(lambda each: ask(each, 4), asking))
        assert not torch.nn.Linear(1, 1).weight.is_meta
    assert [(each.checked, each.mismatches) for each in found] == [(4, ())] * 8


def test_no_honest_answer_raises_an_alarm_after_a_replay(here: TrunkHere, files: ModelFiles) -> None:
    request = GenerationRequest("Once upon a time", max_new_tokens=100, ignore_eos=True)
    with proxy(here.address) as between, checking(files, between.address, 1) as asking:
        found = asking.ask(request, lambda tokens: between.cut() if tokens in (30, 60) else None)
    assert found.recoveries
    assert (found.spot_checks.checked, found.spot_checks.mismatches) == (100, ())


@pytest.mark.parametrize("words", [{"use_cache", "wire_dtype=int8"}, set(), {"use_cache", "wire_dtype=bfloat16"}])
def test_honest_answers_in_other_forms_raise_no_alarm(here: TrunkHere, files: ModelFiles, words: set[str]) -> None:
    with checking(files, here.address, 1, frozenset(words)) as asking:
        found = ask(asking, 40)
    assert (found.checked, found.mismatches) == (40, ())


def test_samples_are_checked_each_by_itself(here: TrunkHere, files: ModelFiles) -> None:
    request = GenerationRequest("Hi", max_new_tokens=9, ignore_eos=True, samples=3, sampling=SamplingParams(1.0))
    with checking(files, here.address, 1) as asking:
        ends = [event.spot_checks for event in asking.stream(request) if isinstance(event, Done)]
    assert [(end.checked, end.mismatches) for end in ends] == [(9, ()), (8, ()), (8, ())]  # the prompt was fed once


def test_a_layer_has_its_weights_only_while_it_computes(files: ModelFiles) -> None:
    stage = trunk_layer_by_layer(files, PLAN, torch.float32)
    assert all(parameter.is_meta for parameter in stage.cut.module.parameters())
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    (whole,) = loading.load(files, loading.trunk_specs(PLAN), LoadSettings(), placement).stages
    x = torch.randn(1, 5, files.facts.hidden_size)
    outputs = [each.eager.cut.module(inputs_embeds=x).last_hidden_state for each in (stage, whole)]
    assert torch.equal(*outputs)
    assert all(parameter.is_meta for parameter in stage.cut.module.parameters())


def test_a_step_of_the_reference_leaves_the_precision_of_the_process_as_it_is(files: ModelFiles) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        stage = trunk_layer_by_layer(files, PLAN, torch.float32)
        session = stage.open(session_of(CACHED), 1)
        stage.step([StageInput(session, 0, torch.randn(1, 1, files.facts.hidden_size))])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_answer_of_each_fifty_is_chosen_at_places_that_differ() -> None:
    checks = SpotChecks(SHARE, PLAN, lambda: pytest.fail(), torch.float32)
    places = [[checks.chooses() for _ in range(50)] for _ in range(40)]
    checks.close()
    assert {sum(each) for each in places} == {1}
    assert len({each.index(True) for each in places}) > 5


@pytest.mark.parametrize(("more", "strict"), [(set(), True), ({"float32_matmul_precision"}, False)])
def test_the_configured_share_finds_one_percent_unless_a_flag_lets_the_client_round_to_bfloat16(
    here: TrunkHere, files: ModelFiles, more: set[str], strict: bool
) -> None:
    """As a worker opens its trunk: the tolerance is that of the flags, not one that a test chose."""
    settings = config.parse({"trunk": {"address": here.address, "verify": SHARE}})
    flags = FlagSet(client=CACHED | more, trunk=CACHED)
    spec = ArmSpec.of("split", settings, files, PLAN, "cpu", flags, hops_of(settings.trunk, PLAN))
    (trunk,) = open_trunks(spec)
    with changed(here, one_percent), client(files, here.address) as asking:
        asking.stage.checks = trunk.checks
        found = ask(asking)
    trunk.close()
    assert found.checked == TOKENS * SHARE and bool(found.mismatches) == strict


def test_checks_of_a_trunk_with_other_weights_are_refused_by_name(files: ModelFiles) -> None:
    settings = config.parse({"trunk": {"address": "127.0.0.1:1", "verify": 0.5}})
    flags = FlagSet(trunk=frozenset({"weight_dtype=int4"}))
    spec = ArmSpec.of("split", settings, files, PLAN, "cpu", flags, hops_of(settings.trunk, PLAN))
    with pytest.raises(InputError, match=r"trunk\.verify.*weight_dtype"):
        open_trunks(spec)


def test_checks_of_a_mixture_of_experts_are_refused_by_name(tiny_model: TinyFactory) -> None:
    experts = tiny_model("mixtral")
    settings = config.parse({"trunk": {"address": "127.0.0.1:1", "verify": 0.5}})
    spec = ArmSpec.of("split", settings, experts, PLAN, "cpu", FlagSet(), hops_of(settings.trunk, PLAN))
    with pytest.raises(InputError, match=r"trunk\.verify.*mixture of experts"):
        open_trunks(spec)


def test_the_server_of_a_flag_that_rounds_raises_no_alarm(files: ModelFiles) -> None:
    flags = "trunk:weight_prepack=onednn,row_attention,use_cache"
    with serve_here(files, flags) as there, checking(files, there.address, 1) as asking:
        found = ask(asking, 40)
    assert (found.checked, found.mismatches) == (40, ())
