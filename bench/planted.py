"""Flags whose effect is known, for testing the method: one that does nothing, and three that wait.

Importing this module adds them to the registry of its process; `splitlearn.runtime.process.PRELOAD` brings it to the
workers.
"""

import time
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from splitlearn.flags.registry import FLAGS, Apply, Flag, Settings
from splitlearn.models.cut import CutModel

PLANTED = {"does_nothing": 0.0, "waits_3_percent": 0.03, "waits_0.2_percent": 0.002}
"""Name of the flag: by which share of a step's own time it makes the step longer."""
PREFILL, PREFILL_SHARE = "waits_5_percent_in_prefill", 0.05
"""A flag that makes steps of more than one token longer, and its share."""


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
    """Make each call of `module` with so many tokens or more longer by `share`: by turning, since a sleep is late by a
    tenth of a millisecond."""
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
    """The tokens that a forward was given. It may return fewer: the LM head computes the last one's logits alone."""
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
