"""What prefix_cache saves: TTFT of the last turn of a conversation; and what another holder can learn from time.

A conversation has a system prompt and TURNS turns, each with the answers before it. The flag's arm takes all of them;
the other one the last, on the same messages.
"""

import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from bench.answer import FAST, report, text_of
from bench.report import table, write
from splitlearn.access import tokens as token_file
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.events import KINDS, GenerationRequest, Kind, Message
from splitlearn.flags.registry import settings
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS
from splitlearn.lab.stats import effect
from splitlearn.wire.channel import Credentials

SYSTEM, TURNS, TOKENS, OPENINGS = 1000, 8, 8, 200
FLAG = "prefix_cache"
QUESTIONS = (
    "What is the longest sentence about?",
    "Say that in fewer words.",
    "Which word is the most important one?",
    "Why that one?",
    "Give an example of it.",
    "And one of the opposite.",
    "Which of the two is more common?",
    "Thank you. Sum up what we have found.",
)


def main(runs: Runs, blocks: int = 4) -> None:
    """Measure and write docs/results/prefix.md."""
    text = text_of(Tokens.load(runs.files.folder, use_fast=True), SYSTEM)
    rows = [_row(kind, [_conversation(runs, kind, f"{block}: {text}") for block in range(blocks)]) for kind in KINDS]
    said = (
        f"{blocks} conversations of {TURNS} turns, with a system prompt of {SYSTEM} tokens and answers of {TOKENS}; "
        f"flags `{FAST}`. TTFT of turn {TURNS} with `{FLAG}` / without it, on the same messages.\n\n"
        f"**What time says of another holder.** {OPENINGS} pairs of sessions of bob, one with the keys of a prompt "
        "that ann's session has left at the trunk, one with keys that nobody has, in random order. Time from Open to "
        f"Opened:\n\n{table([_holders(runs)])}\n"
    )
    write("prefix", "Conversations with a prefix cache", said, rows, environment(runs))


def _conversation(runs: Runs, kind: Kind, system: str) -> tuple[ArmReport, ArmReport]:
    """The last turn with the flag and without it."""
    messages, last = [Message("system", system)], None
    for question in QUESTIONS[:TURNS]:
        if last is not None:
            messages.append(Message("assistant", last.metrics.text))
        messages.append(Message("user", question))
        request = GenerationRequest(tuple(messages), max_new_tokens=TOKENS, ignore_eos=True)
        last = report(runs, kind, runs.flags(f"{FAST},{FLAG}"), request)
    assert last is not None
    return last, report(runs, kind, runs.flags(FAST), request)


def _row(kind: Kind, pairs: list[tuple[ArmReport, ArmReport]]) -> dict[str, Any]:
    kept, whole = ([pair[at].metrics for pair in pairs] for at in (0, 1))
    same = sum(a.token_ids == b.token_ids for a, b in zip(kept, whole, strict=True))
    return {
        "arm": kind,
        "TTFT with / without": str(effect([run.ttft_s for run in kept], [run.ttft_s for run in whole])),
        "prompt, tokens": f"{whole[-1].prompt_tokens}",
        "of these reused": f"{kept[-1].cached_tokens}",
        "same tokens": f"{same} of {len(pairs)}",
    }


def _holders(runs: Runs) -> dict[str, str]:
    secrets = {"ann": "secret-of-ann", "bob": "secret-of-bob"}
    entries = [
        {"name": name, "sha256": token_file.digest(secret), "sessions": 4, "tokens_per_second": 1e6}
        for name, secret in secrets.items()
    ]
    keys = [bytes([at]) * 16 for at in range(16)]
    flags = runs.flags(f"{FAST},{FLAG}").trunk
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.yaml"
        path.write_text(yaml.safe_dump(entries), encoding="utf-8")
        own = runs.config.model_copy(update={"flags": f"trunk:{','.join(sorted(flags))}"})
        trunk = EmbeddedTrunk(own, path)
        with closing(_Server(trunk, runs)) as server:
            server.keep("ann", secrets["ann"], keys)
            return server.timed(secrets["bob"], keys)


class _Server:
    """Sessions of holders at a trunk."""

    def __init__(self, trunk: EmbeddedTrunk, runs: Runs) -> None:
        self._trunk, self._served = trunk, runs.spec("split", runs.flags(FAST)).served()
        self._settings = settings(runs.flags(f"{FAST},{FLAG}").trunk).session

    def close(self) -> None:
        self._trunk.stop()

    def keep(self, name: str, secret: str, keys: list[bytes]) -> None:
        """Leave the blocks of `keys`, and see that `name` finds them again."""
        import torch

        tokens = len(keys) * BLOCK_TOKENS
        with closing(self._stage(secret)) as stage:
            session = stage.open(self._settings, tokens + 1)
            session.step(0, torch.zeros(1, tokens, self._served.hidden_size))
            session.keep_blocks(keys, len(keys))
            session.close()
            (again,) = stage.open_with(self._settings, tokens + 1, 1, keys)
            assert again.most_blocks == len(keys), f"{name} does not find what was kept"
            again.close()

    def timed(self, secret: str, kept: list[bytes]) -> dict[str, str]:
        source, found = random.Random(1), dict[str, list[float]](kept=[], new=[])
        with closing(self._stage(secret)) as stage:
            ways: dict[str, Callable[[], list[bytes]]] = {
                "kept": lambda: kept,
                "new": lambda: [source.randbytes(16) for _ in kept],
            }
            for _ in range(OPENINGS):
                for name in source.sample(list(ways), 2):
                    keys, began = ways[name](), time.perf_counter()
                    (session,) = stage.open_with(self._settings, len(kept) * BLOCK_TOKENS + 1, 1, keys)
                    found[name].append(time.perf_counter() - began)
                    assert not session.most_blocks
                    session.close()
        return {"kept by ann / kept by nobody": str(effect(found["kept"], found["new"]))}

    def _stage(self, secret: str) -> RemoteStage:
        return RemoteStage([self._trunk.address], self._served, 60, Credentials(token=secret))
