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
from splitlearn.proof import check, compare, prove, proven
from splitlearn.proof.apart import prove_apart
from splitlearn.proof.page import PAGE, families_page
from splitlearn.proof.tiny import tiny_config

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
    assert gemma2.sliding_window < compare.PREFILL
    assert set(gemma2.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma2.num_key_value_heads < gemma2.num_attention_heads
    assert gemma2.tie_word_embeddings


def test_a_kind_of_layer_that_comes_late_is_in_the_tiny_copy() -> None:
    kinds = ["sliding_attention"] * 20 + ["full_attention"]
    small = tiny_config(AutoConfig.for_model("gemma2", num_hidden_layers=21, layer_types=kinds), grouped=True)
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
