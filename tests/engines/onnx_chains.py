"""Chains of local stages by ONNX Runtime or torch, and steps that make their caches do all that they can."""

from collections.abc import Iterable, Sequence

import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from splitlearn.stages.base import Stage, StageInput
from tests.support.words import load_of, session_of

CPU = loading.Placement(torch.device("cpu"), torch.float32)
TORCH = frozenset({"low_cpu_mem_usage", "use_cache", "inference_mode"})
ONNX = TORCH | {"engine"}
IDS = torch.randint(300, (1, 64), generator=torch.Generator().manual_seed(3))
STEPS = ((0, 20), (20, 1), (21, 1), (22, 3), (18, 3), (21, 1), (5, 12), (17, 1))
"""Position and number of tokens: a prompt that is longer than the tiny models' windows, decode steps, a step with two
drafts, and truncations, one of them to before the window."""


def chain(files: ModelFiles, plan: SplitPlan | None, words: Iterable[str]) -> Sequence[Stage]:
    """The stages of a model, split by `plan`; None is the full model."""
    if plan is None:
        specs = loading.full_specs(files.n_layers)
    else:
        bottom, *rest = loading.client_specs(plan)
        specs = [bottom, *loading.trunk_specs(plan), *rest]
    return loading.load(files, specs, load_of(words), CPU).chain


def logits(stages: Sequence[Stage], words: Iterable[str]) -> list[torch.Tensor]:
    """The logits of all tokens of each of STEPS."""
    sessions = [stage.open(session_of(words), 32) for stage in stages]
    found = []
    for position, tokens in STEPS:
        x = IDS[:, position : position + tokens]
        for stage, session in zip(stages, sessions, strict=True):
            (output,) = stage.step([StageInput(session, position, x, logits=0)])
            x = output.x
        found.append(x)
    return found
