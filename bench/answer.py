"""Run one request through an arm. FAST are the flags with which full and split are as fast as float32 allows."""

from pathlib import Path

from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.tokenizer import Tokens
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics

FAST = "low_cpu_mem_usage,inference_mode,use_cache,cache,weight_prepack,output_attentions,output_hidden_states"

TEXTS = ("prompts.txt", "more_prompts.txt")


def answer(runs: Runs, kind: Kind, flags: FlagSet, request: GenerationRequest) -> RunMetrics:
    """Run `request` through one arm."""
    return report(runs, kind, flags, request).metrics


def report(runs: Runs, kind: Kind, flags: FlagSet, request: GenerationRequest, link: Link | None = None) -> ArmReport:
    """Run `request` over `link` (None: the configured one) and return the whole report."""
    return next(item for item in runs.stream(kind, flags, request, link=link) if isinstance(item, ArmReport))


def text_of(tokens: Tokens, length: int) -> str:
    """A text of exactly `length` tokens, from the lines of TEXTS."""
    text = " ".join((Path(__file__).parent / name).read_text(encoding="utf-8").replace("\n", " ") for name in TEXTS)
    ids = tokens.encode(" ".join([text] * (2 + length // 100)), chat=False)
    parts = (tokens.decode(ids[start : start + length]) for start in range(len(ids) - length))
    return next(part for part in parts if len(tokens.encode(part, chat=False)) == length)
