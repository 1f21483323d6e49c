"""What a person writes about flags becomes a set for each side, or an error that names what is wrong."""

import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import InputError
from splitlearn.flags.registry import FLAGS, SIDES, Place, Side
from splitlearn.flags.selection import PRESETS, FlagSet, applied_of, availability, chosen_in, parse, why_not
from tests.support.children import output_of

HERE = availability(dict.fromkeys(SIDES, Place("cpu", no_python_tokenizer="only one tokenizer", has_compiler=True)))
UNAVAILABLE = {"use_fast", "cudnn_benchmark", "cuda_graph", "draft_model"}


def of(side: Side) -> frozenset[str]:
    """The flags that act on `side` and can be applied here."""
    return frozenset(name for name, flag in FLAGS.items() if side in flag.sides) - UNAVAILABLE


@pytest.mark.parametrize("side", SIDES)
def test_default_is_every_available_exact_or_rounding_flag_but_those_that_are_off_at_first(side: Side) -> None:
    lossy = {name for name, flag in FLAGS.items() if flag.fidelity == "lossy"}
    off = {"torch_compile", "prompt_lookup", "prefill_overlap", "prefix_cache", "row_attention", "head_overlap"}
    off |= {"engine"}
    assert parse("default", HERE).of(side) == of(side) - off - lossy


def test_all_is_what_can_be_applied_and_none_is_nothing() -> None:
    no_part = {"engine", "gaussian_noise", "topk_sparsification"}
    assert all(parse("all", HERE).of(side) == of(side) - no_part for side in SIDES)
    assert parse("none", HERE) == FlagSet() == parse("", HERE)


def test_beside_another_engine_the_flags_of_torchs_layers_are_left_out() -> None:
    flags = parse("full:engine=onnxruntime,use_cache,weight_prepack client:weight_prepack trunk:none", HERE)
    assert flags.full == {"engine", "use_cache"} and flags.client == {"weight_prepack"}
    assert flags.with_side("client", flags.client | {"engine"}).client == {"engine"}
    assert parse("engine=torch,weight_prepack", HERE).full == {"weight_prepack"}


def test_an_engine_that_is_not_there_is_refused_with_its_reason() -> None:
    there = availability(dict.fromkeys(SIDES, Place("cpu", no_onnxruntime="needs onnx: pip install it")))
    for words in ("engine", "engine=onnxruntime", "trunk:engine"):
        with pytest.raises(InputError, match="pip install it"):
            parse(words, there)


def test_a_flag_is_applied_only_on_the_sides_where_it_acts() -> None:
    flags = parse("fast_top_k,use_cache", HERE)
    assert flags.client == {"fast_top_k", "use_cache"}
    assert flags.trunk == {"use_cache"}


def test_sides_can_be_set_apart_and_the_others_keep_the_default() -> None:
    flags = parse("full:none client:use_cache,inference_mode", HERE)
    assert flags.full == frozenset()
    assert flags.client == {"use_cache", "inference_mode"}
    assert flags.trunk == parse("default", HERE).trunk


def test_another_choice_of_a_flag_is_kept_and_its_off_choice_leaves_it_out() -> None:
    assert parse("float32_matmul_precision=high", HERE).full == {"float32_matmul_precision=high"}
    assert parse("float32_matmul_precision=medium", HERE).full == {"float32_matmul_precision"}
    assert parse("float32_matmul_precision=highest", HERE).full == frozenset()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("use_cach", "use_cach"),
        ("use_cache=maybe", "maybe"),
        ("all,use_cache", "all"),
        ("float32_matmul_precision=high,float32_matmul_precision=medium", "exclude"),
        ("full:all full:none", "full"),
        ("server:all", "server:all"),
        ("cudnn_benchmark", "CUDA"),
        ("trunk:fast_top_k", "does not act"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(words: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse(words, HERE)


@pytest.mark.parametrize(
    ("flag", "place", "reason"),
    [
        ("row_attention", Place("cpu"), None),
        ("row_attention", Place("cpu", dtype="bfloat16"), "bfloat16"),
        ("row_attention", Place("cuda:0"), "cuda"),
        ("weight_prepack", Place("cpu"), None),
        ("weight_prepack", Place("cuda:0"), "CPU"),
        ("weight_dtype", Place("cpu"), None),
        ("weight_dtype", Place("cuda:0"), "CPU"),
        ("cuda_graph", Place("cpu"), "CUDA"),
    ],
)
def test_a_flag_says_where_it_cannot_be_applied(flag: str, place: Place, reason: str | None) -> None:
    said = why_not(flag, "full", place)
    assert said is None if reason is None else reason in (said or "")


def test_words_are_checked_without_torch() -> None:
    code = "import sys; from splitlearn.flags.selection import check; check('fast'); sys.exit('torch' in sys.modules)"
    output_of([sys.executable, "-c", code])


def test_on_a_gpu_tokens_are_recorded_at_first_and_what_is_for_a_cpu_is_not_applied() -> None:
    there = availability(dict.fromkeys(SIDES, Place("cuda:0", has_compiler=True)))
    default, fast = parse("default", there), parse("fast-gpu", there)
    for side in SIDES:
        assert "cuda_graph" in default.of(side) and "weight_prepack" not in default.of(side)
        assert {"cuda_graph", "torch_compile"} <= fast.of(side)
    assert not parse("fast-gpu", HERE).full & {"cuda_graph"}


def test_presets_name_the_flags_of_the_earlier_system() -> None:
    sizes: Mapping[str, Mapping[Side, int]] = {
        name: {side: len(words.split(",")) for side, words in sides.items()} for name, (_, sides) in PRESETS.items()
    }
    assert sizes["earlier-full"]["full"] == 9
    assert sizes["earlier-client"]["client"] == 3
    assert sizes["earlier-library"]["full"] == 2
    for name in PRESETS:
        assert set(parse(name, HERE).names()) <= frozenset(FLAGS) - UNAVAILABLE


def test_without_and_only_act_on_every_side() -> None:
    flags = parse("default", HERE)
    assert all("use_cache" not in flags.without("use_cache").of(side) for side in SIDES)
    assert flags.only("use_cache").names() == ["use_cache"]


@st.composite
def flag_sets(draw: st.DrawFn) -> FlagSet:
    """Any flags and choices that can be applied here, on each side."""
    chosen = {}
    for side in SIDES:
        names = draw(st.sets(st.sampled_from([name for name in FLAGS if HERE[side][name] is None])))
        words = [f"{name}={draw(st.sampled_from(list(FLAGS[name].choices)))}" for name in sorted(names)]
        chosen[side] = applied_of(chosen_in(words))
    return FlagSet(**chosen)


@given(flag_sets())
def test_the_words_of_any_flags_mean_those_flags(flags: FlagSet) -> None:
    words = " ".join(f"{side}:{','.join(sorted(flags.of(side)))}" for side in SIDES)
    assert parse(words, HERE) == flags


@given(flag_sets())
def test_without_and_only_are_complements(flags: FlagSet) -> None:
    for name in flags.names():
        for side in SIDES:
            without, only = flags.without(name).of(side), flags.only(name).of(side)
            assert without | only == flags.of(side)
            assert not without & only
