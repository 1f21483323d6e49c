"""TPOT and TTFT on a GPU, of the default model and of a larger random one.

Compares the decode loop with transformers' `generate()` and with the time to read the weights, `cuda_graph` and
`torch_compile` with eager, and split with full.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.answer import answer, text_of
from bench.echo import SLEEPS, Echo
from bench.pairs import warm_blocks
from bench.ratios import both, difference_s, ratio
from bench.ratios import tokens as same
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints import convert
from splitlearn.checkpoints.folder import seal
from splitlearn.config import Config
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.planning import anatomy
from splitlearn.runtime.progress import silent
from splitlearn.wire.codec import DTYPES

PAIRS = 12
TOKENS = 64
SHORT, LONG = 20, 512
FLAGS = "fast-gpu"
# The arm, and the flags that it leaves out.
ARMS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "full, eager": ("full", ("cuda_graph", "torch_compile")),
    "full, cuda_graph": ("full", ("torch_compile",)),
    "full, both": ("full", ()),
    "split, cuda_graph": ("split", ("torch_compile",)),
    "split, both": ("split", ()),
}
GENERATE = "generate()"
RATIOS = (
    ("full, eager", GENERATE),
    ("full, cuda_graph", GENERATE),
    ("full, both", GENERATE),
    ("full, cuda_graph", "full, eager"),
    ("full, both", "full, eager"),
    ("split, cuda_graph", "full, cuda_graph"),
    ("split, both", "full, both"),
)
IN_FLOAT32 = tuple(pair for pair in RATIOS if "both" not in " ".join(pair))
# Bytes of a step's message beside its hidden state; and how long the echo server holds it, about as long as a trunk.
MORE_BYTES, HOLD_S = 23, 0.001
# 1.07 billion parameters: Llama 3.2 1B with the vocabulary of the default model's tokenizer.
LARGER = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
COPIED_BYTES, COPIES = 4 << 30, 10


def main(runs: Runs) -> None:
    """Measure and write docs/results/gpu.md."""
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing is measured.")
        return
    rate = bandwidth()
    with tempfile.TemporaryDirectory() as work, larger(runs.files.folder, Path(work)) as folder:
        rows = [
            *rows_of(runs.config, "bfloat16", RATIOS, rate),
            *rows_of(runs.config, "float32", IN_FLOAT32, rate),
            *rows_of(named(runs.config, str(folder)), "bfloat16", RATIOS, rate),
        ]
    report(runs, rate, rows)


def report(runs: Runs, rate: float, rows: list[dict[str, str]]) -> None:
    """Write the page."""
    text = (
        f"{torch.cuda.get_device_name()}, whose memory copies {rate / 1e12:.2f} TB/s, read and written. Geometric mean "
        f"ratios with 95% intervals over {PAIRS} blocks, the arms in random order within each, greedy, one "
        f"process for each arm. TPOT: {TOKENS} tokens after a prompt of {SHORT}; TTFT: prompts of {SHORT} and {LONG} "
        f"tokens. The flags are those of the preset `{FLAGS}`, eager without `cuda_graph` and `torch_compile`. limit: "
        "the bytes of all weights at that rate. The larger model is a Llama of 1.07 billion random weights. Difference "
        f"and echo (a round trip of the same bytes, kept for {1e3 * HOLD_S:.0f} ms) are medians."
    )
    write("gpu", "On a GPU", text, rows, environment(runs))


def named(config: Config, name: str) -> Config:
    """The configuration with another model."""
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})


def bandwidth() -> float:
    """Bytes per second that a copy within device memory reads and writes; the median of COPIES."""
    one = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    other, taken = torch.empty_like(one), list[float]()
    for _ in range(COPIES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        other.copy_(one)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * COPIED_BYTES / median(taken)


@contextmanager
def larger(tokenizer: Path, work: Path) -> Iterator[Path]:
    """A converted folder of a Llama with random weights and another model's tokenizer."""
    checkpoint, folder = work / "checkpoint", work / "llama-1b-random"
    read = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    config = LlamaConfig(vocab_size=len(read), eos_token_id=read.eos_token_id, **LARGER)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
    model.cpu().save_pretrained(checkpoint)
    read.save_pretrained(checkpoint)
    folder.mkdir()
    seal(folder, "random weights", convert.convert_in_subprocess(checkpoint, folder, None, silent), silent)
    shutil.rmtree(checkpoint)
    yield folder


def rows_of(config: Config, dtype: str, ratios: Sequence[tuple[str, str]], rate: float) -> list[dict[str, str]]:
    """The table's rows for one model in one dtype."""
    model = config.model.model_copy(update={"dtype": dtype, "device": "cuda"})
    with Runs(config.model_copy(update={"model": model}), silent) as runs:
        tokens = Tokens.load(runs.files.folder, use_fast=True)
        decode, prefill = (
            _measure(runs, ratios, text_of(tokens, length), count) for length, count in ((SHORT, TOKENS), (LONG, 1))
        )
        whole = anatomy.read(runs.files, runs.dtype)
        limit_s = whole.parameters * whole.bytes_per_value / rate
        echo_s = median(run.tpot_s for run in decode["echo"])
    return [
        {
            "model": f"{Path(config.model.name).name}, {dtype}",
            "ratio": f"{name} / {baseline}",
            "TPOT, ms": both(decode, name, baseline, "tpot_s"),
            "TPOT": ratio(decode, name, baseline, "tpot_s"),
            "difference, ms": f"{1e3 * difference_s(decode, name, baseline):.2f}",
            "echo, ms": f"{1e3 * echo_s:.2f}",
            "limit, ms": f"{1e3 * limit_s:.2f}",
            f"TTFT of {SHORT}, ms": both(decode, name, baseline, "ttft_s"),
            f"TTFT of {SHORT}": ratio(decode, name, baseline, "ttft_s"),
            f"TTFT of {LONG}, ms": both(prefill, name, baseline, "ttft_s"),
            f"TTFT of {LONG}": ratio(prefill, name, baseline, "ttft_s"),
            "tokens": same(decode, name, baseline),
        }
        for name, baseline in ratios
    ]


def _measure(runs: Runs, ratios: Sequence[tuple[str, str]], prompt: str, count: int) -> dict[str, list[Generated]]:
    request = GenerationRequest(prompt, max_new_tokens=count, chat=False, ignore_eos=True)
    flags = runs.flags(FLAGS)
    reference, echo = Reference(runs.spec("full", flags)), Echo(SLEEPS)
    message = bytes(runs.files.facts.hidden_size * DTYPES[runs.dtype].itemsize + MORE_BYTES)

    def run(kind: Kind, left_out: Sequence[str]) -> Generated:
        metrics = answer(runs, kind, flags.without(*left_out), request)
        return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)

    def echoed() -> Generated:
        return Generated((), 0.0, median(echo.step(HOLD_S, message) for _ in range(TOKENS)))

    arms: dict[str, Callable[[], Generated]] = {
        GENERATE: lambda: reference.run(prompt, count, chat=False),
        "echo": echoed,
        **{name: partial(run, *ARMS[name]) for name in sorted({name for pair in ratios for name in pair} - {GENERATE})},
    }
    try:
        return warm_blocks(arms, PAIRS)
    finally:
        reference.stop()
        echo.close()
