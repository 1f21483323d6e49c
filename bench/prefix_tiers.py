"""TTFT of conversations that come back from files to the full arm, against computing them again.

CONVERSATIONS come in turn, with room for ROOM of them in memory. Then some come a second time, with the flag and
without it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.answer import FAST, report, text_of
from bench.report import write
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.config import PrefixCacheConfig, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import parse
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS
from splitlearn.lab.stats import effect
from splitlearn.runtime import hardware
from splitlearn.runtime.progress import silent

CONVERSATIONS, BACK, ROOM, TOKENS = 32, 8, 4, 10 * BLOCK_TOKENS
FLAG = "prefix_cache"


def main(runs: Runs) -> None:
    """Measure and write docs/results/prefix_tiers.md."""
    with TemporaryDirectory() as folder:
        sizes = runs.model.capabilities.kv_bytes
        kept = PrefixCacheConfig(memory_bytes=ROOM * TOKENS * sum(sizes), file_bytes=1 << 32, folder=Path(folder))
        changes = {"prefix_cache": kept, "runs": RunsConfig(threads=1)}
        with Runs(runs.config.model_copy(update=changes), silent) as own:
            pairs = _pairs(own, text_of(Tokens.load(runs.files.folder, use_fast=True), TOKENS))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.block"))
    text = (
        f"{CONVERSATIONS} prompts of {TOKENS} tokens and a number in turn, with room for {ROOM} of them in memory; the "
        f"full arm, one thread, flags `{FAST}`. Then {BACK} of them come again, out of files, each with `{FLAG}` and "
        "without it."
    )
    place = {**hardware.describe(), "device": runs.device, "digest": runs.files.digest}
    write("prefix_tiers", "Kept prefixes that come back from files", text, [_row(pairs, size)], place)


def _pairs(runs: Runs, text: str) -> list[tuple[ArmReport, ArmReport]]:
    """Of each conversation that comes back: with the flag and without it."""
    flags, bare = (parse(words, runs.availability_here) for words in (f"{FAST},{FLAG}", FAST))
    requests = [
        GenerationRequest(f"{number}: {text}", max_new_tokens=2, chat=False, ignore_eos=True)
        for number in range(CONVERSATIONS)
    ]
    for request in requests:
        report(runs, "full", flags, request)
    again = requests[:: CONVERSATIONS // BACK]
    return [(report(runs, "full", flags, each), report(runs, "full", bare, each)) for each in again]


def _row(pairs: list[tuple[ArmReport, ArmReport]], size: int) -> dict[str, Any]:
    back, whole = ([pair[at].metrics for pair in pairs] for at in (0, 1))
    same = sum(a.token_ids == b.token_ids for a, b in zip(back, whole, strict=True))
    return {
        "TTFT with / without": str(effect([run.ttft_s for run in back], [run.ttft_s for run in whole])),
        "prompt, tokens": f"{whole[-1].prompt_tokens}",
        "of these reused": ", ".join(sorted({str(run.cached_tokens) for run in back})),
        "same tokens": f"{same} of {len(pairs)}",
        "in files, MB": f"{size / 1e6:.0f}",
    }
