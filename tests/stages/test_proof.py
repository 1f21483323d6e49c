"""A split gives exactly the logits of the whole model, and what does not is refused with the reason."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from splitlearn.errors import FamilyRefused
from splitlearn.models.cut import forward
from splitlearn.stages.equivalence import check, compare, prove, proven, steps
from splitlearn.stages.equivalence.child import prove_apart
from splitlearn.stages.equivalence.page import PAGE, families_page
from splitlearn.stages.equivalence.tiny import ORIGINAL, tiny_config

TEN = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_neox", "opt", "bloom")


@pytest.mark.parametrize("family", TEN)
def test_split_minus_full_is_zero_in_prefill_decode_and_a_step_of_three(family: str) -> None:
    result = prove(AutoConfig.for_model(family))
    assert (result.exact, result.difference, result.reason) == (True, 0.0, "")


def test_the_ten_have_a_tied_head_a_sliding_window_grouped_heads_and_learned_positions() -> None:
    families = proven.proven()["families"]
    notes = {note for family in TEN for note in families[family]["notes"]}
    assert notes >= {"tied head", "sliding window", "grouped KV", "learned positions"}


def test_at_least_sixty_families_are_proven_all_with_a_difference_of_zero() -> None:
    families = proven.proven()["families"]
    assert len(families) >= 60
    assert {entry["difference"] for entry in families.values()} == {0.0}


def test_the_page_is_what_the_data_says() -> None:
    assert PAGE.read_text() == families_page(proven.proven())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "in steps over a plain KV cache it differs"),
        ("qwen3_next", "more than a plain KV cache holds"),
        ("gemma4_text", "a tiny copy does not run"),
        ("doge", "differs from generate"),
        ("moshi", "differs from generate"),
        ("nanochat", "split and full differ"),
        ("bert", "later tokens"),
        ("bart", "encoder-decoder"),
    ],
)
def test_an_architecture_that_cannot_be_cut_is_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(FamilyRefused, match=reason):
        check(AutoConfig.for_model(family))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The configurations that `check` tried on a tiny copy."""
    tried: list[Any] = []
    monkeypatch.setattr(proven, "_results", {})

    def watched(config: Any) -> compare.Result:
        tried.append(config)
        return compare.prove(config)

    monkeypatch.setattr(proven, "prove", watched)
    yield tried


def test_a_proven_family_is_not_tried_again(calls: list[Any]) -> None:
    check(AutoConfig.for_model("llama"))
    assert not calls


def test_a_proven_family_with_a_new_kind_of_layer_is_tried(calls: list[Any]) -> None:
    kinds = ["conv", "full_attention"] * 3
    with pytest.raises(FamilyRefused, match="more than a plain KV cache holds"):
        check(AutoConfig.for_model("lfm2", num_hidden_layers=6, layer_types=kinds))
    assert len(calls) == 1


FACTORS = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0] * 6


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=2048)),
        ("llama", _rope("linear", factor=4.0)),
        ("phi3", {"sliding_window": 2047}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}),
        ("falcon", {"alibi": True}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_what_the_default_configuration_does_not_have_is_tried(
    calls: list[Any], family: str, own: dict[str, Any]
) -> None:
    check(AutoConfig.for_model(family, **own))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "own", [{"max_position_embeddings": 8192}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"unknown": 3}]
)
def test_a_size_or_a_name_that_no_model_reads_is_no_reason_to_try(calls: list[Any], own: dict[str, Any]) -> None:
    check(AutoConfig.for_model("llama", **own))
    assert not calls


def test_the_same_configuration_is_tried_once(calls: list[Any]) -> None:
    for _ in range(3):
        check(AutoConfig.for_model("llama", **_rope("linear", factor=3.0)))
    assert len(calls) == 1


def test_full_and_split_that_are_wrong_alike_past_a_boundary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_most_eleven(stage: Any, x: Any, position: int, cache: Any, **given: Any) -> Any:
        return forward(stage, x, min(position, ORIGINAL), cache, **given)

    monkeypatch.setattr(steps, "forward", at_most_eleven)
    assert "differs from generate() by" in prove(AutoConfig.for_model("llama")).reason


def test_a_whole_model_that_is_not_what_generate_gives_is_refused_too() -> None:
    with pytest.raises(FamilyRefused, match="mamba models cannot be run in steps: .* differs from generate"):
        check(AutoConfig.for_model("mamba"), split=False)


def test_a_model_of_which_only_a_split_differs_runs_whole() -> None:
    check(AutoConfig.for_model("nanochat"), split=False)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss", "llama4_text", "phi3", "deepseek_v2"])
def test_a_text_is_longer_than_each_boundary_that_the_tiny_copy_names(family: str) -> None:
    small = tiny_config(AutoConfig.for_model(family), grouped=True)
    names = ("sliding_window", "attention_chunk_size", "floor_scale", "original_max_position_embeddings")
    rotary = getattr(small, "rope_parameters", None) or {}
    found = [getattr(small, name, None) for name in (*names, "max_position_embeddings")]
    lengths = [each for each in (*found, rotary.get("original_max_position_embeddings")) if each]
    assert all(steps.SHORT <= each < steps.LONG for each in lengths)
    assert lengths


def test_under_another_version_of_transformers_nothing_counts_as_proven(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", "0.0.0")
    check(AutoConfig.for_model("llama"))
    assert len(calls) == 1


def test_an_unlisted_family_that_can_be_cut_is_accepted(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = proven.proven()
    del data["families"]["gpt2"]
    monkeypatch.setattr(proven, "proven", lambda: data)
    check(AutoConfig.for_model("gpt2"))
    assert len(calls) == 1


def _hang(family: str, sender: Connection) -> None:
    time.sleep(60)


def _crash(family: str, sender: Connection) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(("work", "reason"), [(_hang, "did not end"), (_crash, "without a result")])
def test_a_proof_that_hangs_or_crashes_is_a_refusal(work: Any, reason: str) -> None:
    context = multiprocessing.get_context("forkserver")
    result = prove_apart(context, "llama", "LlamaForCausalLM", work, limit_s=60.0 if work is _crash else 0.5)
    assert not result.exact
    assert reason in result.reason


def test_a_tiny_copy_keeps_what_matters() -> None:
    granite = tiny_config(AutoConfig.for_model("granite"), grouped=True)
    gemma2 = tiny_config(AutoConfig.for_model("gemma2"), grouped=True)
    assert granite.embedding_multiplier != 1.0
    assert gemma2.sliding_window < steps.LONG
    assert set(gemma2.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma2.num_key_value_heads < gemma2.num_attention_heads
    assert gemma2.tie_word_embeddings


def test_a_kind_of_layer_that_comes_late_is_in_the_tiny_copy() -> None:
    kinds = ["sliding_attention"] * 20 + ["full_attention"]
    small = tiny_config(AutoConfig.for_model("gemma2", num_hidden_layers=21, layer_types=kinds), grouped=True)
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
