"""Flags with a known effect, to test the lab's method: one does nothing, three make steps longer.

Importing this module adds them to the registry of its process. `splitlearn.runtime.process.PRELOAD` imports it in the
workers.
"""

import time
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from splitlearn.flags import selection
from splitlearn.flags.registry import FLAGS, Apply, Flag, Settings
from splitlearn.models.cut import CutModel

PLANTED = {"does_nothing": 0.0, "waits_3_percent": 0.03, "waits_0.2_percent": 0.002}
"""By flag: the share of a step's own time that it adds to the step."""
PREFILL, PREFILL_SHARE = "waits_5_percent_in_prefill", 0.05
"""The flag that makes only steps of more than one token longer, and its share."""


def _waiting(share: float, least_tokens: int = 1) -> Apply:
    def change(settings: Settings) -> Settings:
        before = settings.load.compile_stage

        def prepare(cut: CutModel) -> CutModel:
            cut = cut if before is None else before(cut)
            _wait_after(cut.module, share, least_tokens)
            return cut

        return replace(settings, load=replace(settings.load, compile_stage=prepare))

    return change


def _wait_after(module: nn.Module, share: float, least_tokens: int) -> None:
    """Make each call of `module` with at least `least_tokens` tokens longer by `share`. It spins, since a sleep is late
    by a tenth of a millisecond."""
    began: list[float] = []

    def start(*_: Any) -> None:
        began.append(time.perf_counter())

    def wait(_: nn.Module, __: Any, given: dict[str, Any], ___: Any) -> None:
        now, started = time.perf_counter(), began.pop()
        until = now + share * (now - started) * (_tokens(given) >= least_tokens)
        while time.perf_counter() < until:
            pass

    module.register_forward_pre_hook(start)
    module.register_forward_hook(wait, with_kwargs=True)


def _tokens(given: dict[str, Any]) -> int:
    """The input tokens of a forward. Its output may have fewer: the LM head computes only the last one's logits."""
    ids = given.get("input_ids")
    return int((given["inputs_embeds"] if ids is None else ids).shape[1])


def _flag(name: str, share: float, least_tokens: int = 1) -> Flag:
    nothing: Callable[[Settings], Settings] = lambda settings: settings  # noqa: E731
    return Flag(
        name,
        name,
        "Planted for testing the lab.",
        "Not planted.",
        {"off": nothing, "on": _waiting(share, least_tokens) if share else nothing},
        sides=frozenset({"full", "client"}),
        scope="load",
        on_by_default=False,
    )


cast(MutableMapping[str, Flag], FLAGS).update({name: _flag(name, share) for name, share in PLANTED.items()})
cast(MutableMapping[str, Flag], FLAGS)[PREFILL] = _flag(PREFILL, PREFILL_SHARE, least_tokens=2)
selection.TEXTS = (*selection.TEXTS, *PLANTED, PREFILL)
