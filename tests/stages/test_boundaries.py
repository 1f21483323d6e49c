"""Past every length from which a model computes otherwise, each way through a stage gives what `generate()` gives.

The boundaries: sliding windows, chunks of attention, scaled queries, linear biases, positions past the first context.
The judge is transformers' own `generate()` on the uncut model, never one of our two arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.plan import SplitPlan
from splitlearn.sampling import SamplingParams
from splitlearn.stages import equivalence, loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from tests.support.tiny import make_converted
from tests.support.words import generation_of, load_of, session_of

PLAN = SplitPlan(2, 4, 6)
WINDOW, TOTAL, SHORT, LONG = 8, 30, 5, 20
PENALTY = 1.5
PROMPT = "Past the window, the chunk and the original context."
SPREAD: dict[str, Any] = {"initializer_range": 0.4, "vocab_size": 400}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_positions": 256}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "max_position_embeddings": 16}),
    "gpt_oss": ("gpt_oss", {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"max_seq_len": 64}),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "llama": ("llama", {"max_position_embeddings": 16}),
    "llama4": (
        "llama4_text",
        {"attention_chunk_size": WINDOW, "floor_scale": LONG // 2, "intermediate_size_mlp": 96, "num_local_experts": 2},
    ),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": LONG // 2,
                "llama_4_scaling_beta": 0.5,
            }
        },
    ),
}
SHARED = {"gpt2", "gemma2", "gemma3", "mistral", "gpt_oss", "llama", "ministral3"}
UNCHANGING = {"mpt", "falcon-alibi"}
"""Families that cannot attend to memory of one length."""
KEPT = frozenset({"low_cpu_mem_usage", "use_cache", "inference_mode"})
CACHES = {"dynamic": KEPT, "reserved": KEPT | {"cache"}, "static": KEPT | {"cache=static"}}
ATTENTION = {
    "own": frozenset({"output_attentions"}),
    "eager": frozenset[str](),
    "row": frozenset({"output_attentions", "row_attention"}),
}


@dataclass(frozen=True)
class Judged:
    """A model's files, and what `generate()` gives after a short prompt and after a long one: by the tokens of the
    prompt, ids [1, TOTAL] and the logits [TOTAL - prompt, V] of its answer."""

    name: str
    files: ModelFiles
    model: Any
    texts: dict[int, tuple[torch.Tensor, torch.Tensor]]


def _generated(model: Any, prompt: torch.Tensor, total: int = TOTAL) -> tuple[torch.Tensor, torch.Tensor]:
    model.generation_config = GenerationConfig(pad_token_id=0)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=total - prompt.shape[1],
        do_sample=False,
        repetition_penalty=PENALTY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.cat(out.logits)


@pytest.fixture(scope="module", params=FAMILIES)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    family, own = FAMILIES[request.param]
    folder: Path = tmp_path_factory.mktemp("boundaries") / request.param
    files = make_converted(folder, family, **dict[str, Any](SPREAD | own))
    model = AutoModelForCausalLM.from_pretrained(folder.with_name(f"{folder.name}-checkpoint")).eval()
    ids = torch.randint(10, 390, (1, LONG), generator=torch.Generator().manual_seed(3))
    return Judged(request.param, files, model, {tokens: _generated(model, ids[:, :tokens]) for tokens in (SHORT, LONG)})


def _loaded(judged: Judged, specs: Sequence[loading.StageSpec], applied: frozenset[str]) -> tuple[LocalStage, ...]:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    return loading.load(judged.files, specs, load_of(applied), placement).stages


def _whole(judged: Judged, applied: frozenset[str]) -> LocalStage:
    return _loaded(judged, loading.full_specs(6), applied)[0]


def _steps(stage: LocalStage, session: LocalSession, ids: torch.Tensor, ends: Sequence[int], at: int = 0) -> None:
    """Steps that end at `ends`, without a look at what comes out."""
    for end in ends:
        stage.step([StageInput(session, at, ids[:, at:end])])
        at = end


def _answer(stage: LocalStage, session: LocalSession, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The logits [TOTAL - 1 - start, V] after each token from `start` on, one by one."""
    steps = [stage.step([StageInput(session, at, ids[:, at : at + 1])])[0].x[0] for at in range(start, TOTAL - 1)]
    return torch.cat(steps)


def _as_generate(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both are logits [n, V], and those of the last n tokens are meant."""
    wanted = wanted[-len(found) :]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-3 * float(wanted.abs().max()))


def test_one_by_one_over_each_cache_and_with_each_attention(judged: Judged) -> None:
    for way, attention in ATTENTION.items():
        if judged.name == "falcon-alibi" and way == "eager":
            continue  # transformers' two attentions differ there
        stage = _whole(judged, KEPT | attention)
        for kind, applied in CACHES.items():
            ids, wanted = judged.texts[SHORT]
            if kind == "static" and judged.name in UNCHANGING:
                with pytest.raises(InputError, match="cache: 'static'"):
                    stage.open(session_of(applied | attention), TOTAL)
                continue
            session = stage.open(session_of(applied | attention), TOTAL)
            _steps(stage, session, ids, (SHORT - 1,))
            _as_generate(_answer(stage, session, ids, SHORT - 1), wanted)


@pytest.mark.parametrize("kind", CACHES)
def test_a_prompt_in_pieces_a_fork_and_a_way_back_over_a_boundary(judged: Judged, kind: str) -> None:
    if kind == "static" and judged.name in UNCHANGING:
        return
    applied = CACHES[kind] | ATTENTION["own"]
    stage, (ids, wanted) = _whole(judged, applied), judged.texts[LONG]
    session, other = (stage.open(session_of(applied), TOTAL + 5) for _ in range(2))
    _steps(stage, session, ids, (7, 14, LONG))
    other.fork(session, LONG)
    _as_generate(_answer(stage, session, ids, LONG), wanted)
    _as_generate(_answer(stage, other, ids, LONG), wanted)
    _steps(stage, session, ids.flip(1), (SHORT + 9,), at=SHORT)  # what did not come true
    _steps(stage, session, ids, (LONG,), at=SHORT)
    _as_generate(_answer(stage, session, ids, LONG), wanted)


def test_two_sessions_on_either_side_of_a_boundary_are_what_each_is_alone(judged: Judged) -> None:
    applied = CACHES["reserved"] | ATTENTION["own"]
    stage, prompts = _whole(judged, applied), (SHORT, LONG)
    assert stage.packs(session_of(applied)) == (judged.name in SHARED)
    sessions = stage.open_together(session_of(applied), TOTAL, 2)
    found: dict[int, list[torch.Tensor]] = {SHORT: [], LONG: []}
    at = dict.fromkeys(prompts, 0)
    while live := [prompt for prompt in prompts if at[prompt] < TOTAL - 1]:
        ends = {prompt: max(prompt, at[prompt] + 1) for prompt in live}
        items = [
            StageInput(
                sessions[prompts.index(prompt)], at[prompt], judged.texts[prompt][0][:, at[prompt] : ends[prompt]]
            )
            for prompt in live
        ]
        for prompt, output in zip(live, stage.step(items), strict=True):
            found[prompt].append(output.x[0, -1:])
            at[prompt] = ends[prompt]
    for prompt in prompts:
        _as_generate(torch.cat(found[prompt]), judged.texts[prompt][1][: TOTAL - prompt])


@pytest.mark.parametrize("flags", [frozenset(), frozenset({"cache", "prefill_overlap", "prompt_lookup"})])
def test_the_tokens_of_full_and_split_are_those_of_generate(judged: Judged, flags: frozenset[str]) -> None:
    applied = KEPT | ATTENTION["own"] | flags
    tokens = Tokens.load(judged.files.folder, use_fast=True)
    ids = tokens.encode(PROMPT, True)
    wanted = _generated(judged.model, torch.tensor([ids]), len(ids) + 16)[0][0, len(ids) :].tolist()
    assert len(ids) > 2 * WINDOW
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    client = loading.load(judged.files, loading.client_specs(PLAN), load_of(applied), placement).chain
    trunk = _loaded(judged, loading.trunk_specs(PLAN), applied)
    for stages in ([_whole(judged, applied)], [client[0], *trunk, *client[1:]]):
        made = Generator(
            [Link(stage, session_of(applied)) for stage in stages],
            tokens,
            None,
            replace(generation_of(applied), chunk_tokens=7 if "prefill_overlap" in flags else None),
        )
        request = GenerationRequest(
            PROMPT,
            chat=True,
            max_new_tokens=16,
            ignore_eos=True,
            sampling=SamplingParams(repetition_penalty=PENALTY),
        )
        events = [event for event in made.stream(request) if isinstance(event, TokenEvent)]
        assert [token for event in events for token in event.token_ids] == wanted


def test_what_sessions_may_share_is_found_past_each_boundary_and_not_by_a_few_tokens(judged: Judged) -> None:
    config = judged.model.config
    assert (equivalence.SHARED_FORWARD in equivalence.allows(config)) == (judged.name in SHARED)
    assert (equivalence.STATIC_CACHE in equivalence.allows(config)) == (judged.name not in UNCHANGING)
