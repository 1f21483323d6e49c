"""What each flag changes in the default model's logits, and whether full and split give the same tokens.

Logits: each flag alone against no flags, and each left out against all flags, for both arms, over fixed sequences.
Tokens: 20 prompts of 64 tokens through both arms' workers and the trunk server, with no flags, with the default flags,
and with seeded sampling.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.answer import answer
from bench.report import write
from splitlearn.arms.compare import KINDS, environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.events import GenerationRequest
from splitlearn.flags.registry import FLAGS
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.design import SAMPLED
from splitlearn.lab.logit_fidelity import Difference, FixedInput, Logits, difference, logits_in_subprocess
from splitlearn.metrics import first_divergence
from splitlearn.sampling import SamplingParams

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
TOKENS = 64
STEPS = 8
SEQUENCES = 1
SAMPLED_BY = ", ".join(
    f"{each.name} {value}" for each in fields(SAMPLED) if (value := getattr(SAMPLED, each.name)) != each.default
)


def main(runs: Runs) -> None:
    """Measure and write docs/results/fidelity.md."""
    equal = [
        f"- {name}: {_identical(runs, flags, sampling)} of {len(PROMPTS)} prompts with identical token ids"
        for name, flags, sampling in (
            ("no flags, greedy", FlagSet(), SamplingParams()),
            ("default flags, greedy", runs.flags("default"), SamplingParams()),
            (f"default flags, sampled ({SAMPLED_BY})", runs.flags("default"), SAMPLED),
        )
    ]
    text = (
        f"Full against split, {len(PROMPTS)} prompts of {TOKENS} tokens, end token ignored:\n\n"
        + "\n".join(equal)
        + "\n\n"
        f"Logits over fixed sequences (n = {SEQUENCES}), each a prompt and {STEPS} single tokens: the largest "
        "difference, and the first step at which another token is best (none: no step). torch_compile takes minutes "
        "to compile and is left out here; tests/flags/test_fidelity.py has it on a small model."
    )
    write("fidelity", "What each flag changes, and what it does not", text, _rows(runs), environment(runs))


def _identical(runs: Runs, flags: FlagSet, sampling: SamplingParams) -> int:
    count = 0
    for number, prompt in enumerate(PROMPTS, 1):
        request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True, sampling=sampling)
        full, split = (_ids(runs, kind, flags, request) for kind in KINDS)
        count += first_divergence(full, split) is None
        print(f"prompt {number} of {len(PROMPTS)}: {count} identical", flush=True)
    return count


def _ids(runs: Runs, kind: Kind, flags: FlagSet, request: GenerationRequest) -> tuple[int, ...]:
    return answer(runs, kind, flags, request).token_ids


def _rows(runs: Runs) -> list[dict[str, Any]]:
    everything = runs.flags("all").without("torch_compile")
    sequences = [_sequence(runs, prompt) for prompt in PROMPTS[:SEQUENCES]]

    def measure(kind: Kind, flags: FlagSet) -> list[Logits]:
        threads = runs.config.runs.threads
        print(f"logits: {kind}, {' '.join(flags.names()) or 'none'}", flush=True)
        return [
            logits_in_subprocess(FixedInput(runs.files, runs.plan, kind, flags, tuple(ids), prompt, threads))
            for ids, prompt in sequences
        ]

    ends = (("none", FlagSet()), ("all", everything))
    baselines = {(kind, words): measure(kind, flags) for kind in KINDS for words, flags in ends}
    both: dict[Kind, Pair] = {kind: (baselines[kind, "all"], baselines[kind, "none"]) for kind in KINDS}
    rows = [_row("all, against none", "rounding", both)]
    rows += [
        {"what": f"{words}: split, against full", "fidelity": "", "full": "", "split": _worst(split, full)}
        for words, split, full in ((end, baselines["split", end], baselines["full", end]) for end, _ in ends)
    ]
    for name in everything.names():
        alone = {kind: (measure(kind, everything.only(name)), baselines[kind, "none"]) for kind in KINDS}
        out = {kind: (measure(kind, everything.without(name)), baselines[kind, "all"]) for kind in KINDS}
        rows.append(_row(f"{name} alone, against none", FLAGS[name].fidelity, alone))
        rows.append(_row(f"{name} left out, against all", FLAGS[name].fidelity, out))
    return rows


def _sequence(runs: Runs, prompt: str) -> tuple[list[int], int]:
    """A prompt's ids followed by STEPS ids of its greedy continuation, and how many of them are the prompt."""
    ids = Tokens.load(runs.files.folder, use_fast=True).encode(prompt, chat=True)
    request = GenerationRequest(prompt, max_new_tokens=STEPS, ignore_eos=True)
    return [*ids, *_ids(runs, "full", FlagSet(), request)], len(ids)


Pair = tuple[list[Logits], list[Logits]]


def _row(what: str, fidelity: str, arms: dict[Kind, Pair]) -> dict[str, Any]:
    return {"what": what, "fidelity": fidelity, **{kind: _worst(*arms[kind]) for kind in KINDS}}


def _worst(variant: list[Logits], baseline: list[Logits]) -> str:
    found: list[Difference] = [difference(a, b) for a, b in zip(variant, baseline, strict=True)]
    steps = [each.first_divergence for each in found if each.first_divergence is not None]
    return f"{max(each.largest for each in found):.2g}, {min(steps) if steps else 'none'}"
