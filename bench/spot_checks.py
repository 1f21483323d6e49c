"""Spot checks of the default model's trunk (docs/trust.md): honest trunks, dishonest ones, and what checking costs.

A dishonest trunk is a server process of its own. It reads a folder whose weights are others, and whose manifest says
the digest of the real ones: so it claims what the client asks for.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.answer import answer
from bench.chaos import CLIENTS, PROMPTS, chaos
from bench.overhead import PLAIN
from bench.pairs import warm_blocks
from bench.report import table, write
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints import folder
from splitlearn.checkpoints.folder import MANIFEST, WEIGHTS, ModelFiles
from splitlearn.config import Config, serving, with_trunk
from splitlearn.events import GenerationRequest, SpotCheckResult
from splitlearn.lab.environment import trunk_pid
from splitlearn.lab.stats import effect
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

BLOCKS = 12
SHARE, TOKENS = 0.02, 200
HONEST_KILLS = 8
"""Of the trunk while four clients generate: 1,000 answers and more."""
LAYER = 14
Weights = dict[str, Tensor]


def one_percent(weights: Weights) -> None:
    """One matrix, changed by 1%."""
    weights[f"model.layers.{LAYER}.mlp.down_proj.weight"] *= 1.01


def left_out(weights: Weights) -> None:
    """A layer that adds nothing to the hidden state."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.{LAYER}.{name}.weight"].zero_()


def other_four_bits(weights: Weights) -> None:
    """Every matrix of the layers in 4 bits, of another grouping than the model's file has."""
    for name, value in weights.items():
        if "layers." in name and value.ndim == 2:
            weights[name] = _rounded(value, 15, 64)


LIES: dict[str, Callable[[Weights], None]] = {
    "one weight matrix changed by 1%": one_percent,
    "one layer left out": left_out,
    "4 bits a weight in blocks of 64": other_four_bits,
}


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/spot_checks.md."""
    honest = [_honest(runs.config, flags) for flags in (PLAIN, "auto")]
    found = [_dishonest(runs, name, flags) for flags in (PLAIN, "auto") for name in LIES]
    cost = [_cost(runs.config, flags, blocks) for flags in (PLAIN, "auto")]
    text = (
        f"`plain` are the flags `{PLAIN}`. Honest: four clients at once, whose steps share forwards, all answers "
        f"checked (`verify: 1`), and the trunk killed {HONEST_KILLS} times, so that sessions are replayed.\n\n"
        f"{table(honest)}\n\nDishonest: a server process whose weights are not what it claims, `verify: {SHARE}`, "
        f"one answer of {TOKENS} tokens. *First* is the token at which it was found first.\n\n{table(found)}\n\n"
        f"Cost: TPOT with `verify: {SHARE}` / without, {TOKENS} tokens, {blocks} blocks in random order, one trunk."
    )
    write("spot_checks", "Spot checks of a trunk", text, cost, environment(runs))


def _honest(config: Config, flags: str) -> dict[str, Any]:
    requests = [GenerationRequest(prompt, max_new_tokens=64, ignore_eos=True) for prompt in PROMPTS[:CLIENTS]]
    with Runs(_checking(config, 1.0), silent) as runs:
        chosen = runs.flags(flags)
        (address,) = runs.ready_spec("split", chosen).hops[0].addresses
        found, _ = chaos(
            runs, chosen, requests, HONEST_KILLS, random.Random(0), lambda: psutil.Process(trunk_pid(address)).kill()
        )
    checks = SpotCheckResult.of(found.spot_checks)
    return {
        "flags": _name(flags),
        "answers checked": checks.checked,
        "replays": len(found.recoveries),
        "alarms": len(checks.mismatches),
    }


def _dishonest(runs: Runs, name: str, flags: str) -> dict[str, Any]:
    with (
        lying_server(runs, LIES[name], flags) as address,
        Runs(_checking(runs.config, SHARE, address), silent) as asking,
    ):
        metrics = _ask(asking, flags, PROMPTS[0])
    wrong = metrics.spot_checks.mismatches
    worst = max(wrong, key=lambda each: each.error / each.allowed, default=None)
    return {
        "flags": _name(flags),
        "the trunk has": name,
        "checked": metrics.spot_checks.checked,
        "found wrong": len(wrong),
        "first": wrong[0].position - metrics.prompt_tokens + 1 if wrong else "not found",
        "largest error, allowed": f"{worst.error:.1e}, {worst.allowed:.1e}" if worst else "",
    }


@contextmanager
def lying_server(runs: Runs, change: Callable[[Weights], None], flags: str) -> Iterator[str]:
    """The address of a server process with changed weights that claims the real ones' digest."""
    with TemporaryDirectory() as into:
        own = runs.config.model.model_copy(update={"name": str(_copy(runs.files, Path(into) / "model", change))})
        applied = runs.flags(flags).trunk
        trunk = EmbeddedTrunk(serving(runs.config.model_copy(update={"model": own}), applied))
        try:
            yield trunk.address
        finally:
            trunk.stop()


def _copy(files: ModelFiles, into: Path, change: Callable[[Weights], None]) -> Path:
    """A folder of the same model with other weights, whose manifest names the hash of the real ones."""
    shutil.copytree(files.folder, into)
    weights = load_file(files.weights)
    change(weights)
    save_file(weights, into / WEIGHTS, {"format": "pt"})
    real = json.loads((files.folder / MANIFEST).read_text(encoding="utf-8"))
    folder.seal(
        into, files.source, files.facts, silent, name=files.name, weights_sha256=real["files"][WEIGHTS]["sha256"]
    )
    return into


def _rounded(weight: Tensor, steps: int, block: int) -> Tensor:
    """`weight` [out, in] with so many steps between the least and the largest value of each block of a row."""
    blocks = weight.float().reshape(-1, block)
    least, most = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = ((most - least) / steps).clamp_min(1e-12)
    return (((blocks - least) / scale).round() * scale + least).reshape(weight.shape).to(weight.dtype)


def _cost(config: Config, flags: str, blocks: int) -> dict[str, Any]:
    trunk = EmbeddedTrunk(config.model_copy(update={"flags": flags}))
    with ExitStack() as stack:
        stack.callback(trunk.stop)
        each = {
            share: stack.enter_context(Runs(_checking(config, share, trunk.address), silent)) for share in (0.0, SHARE)
        }
        arms = {str(share): partial(_ask, own, flags, PROMPTS[0]) for share, own in each.items()}
        found = warm_blocks(arms, blocks)
    tpot = {share: [run.tpot_s or 0.0 for run in listed] for share, listed in found.items()}
    return {
        "flags": _name(flags),
        "answers checked": sum(run.spot_checks.checked for run in found[str(SHARE)]),
        "TPOT": str(effect(tpot[str(SHARE)], tpot["0.0"])),
    }


def _ask(runs: Runs, flags: str, prompt: str) -> RunMetrics:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    return answer(runs, "split", runs.flags(flags), request)


def _checking(config: Config, share: float, address: str | None = None) -> Config:
    """The same settings with checks, and another trunk if there is an address."""
    own = config if address is None else with_trunk(config, address)
    return own.model_copy(update={"trunk": own.trunk.model_copy(update={"verify": share})})


def _name(flags: str) -> str:
    return "plain" if flags == PLAIN else flags
