"""Each flag on each side: applied, available, or unavailable and why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from splitlearn.flags.registry import FLAGS, SIDES, Side
from splitlearn.flags.selection import Availability, FlagSet

State = Literal["applied", "available", "unavailable"]


@dataclass(frozen=True)
class FlagState:
    """A flag on one side. `choice` is the applied one, None at the off arm; `reason` says why it is unavailable."""

    state: State
    choice: str | None = None
    reason: str | None = None


def states(available: Availability, applied: FlagSet) -> dict[str, dict[Side, FlagState]]:
    """The state of each flag on each side, in the registry's order."""
    chosen = {side: dict(text.partition("=")[::2] for text in applied.of(side)) for side in SIDES}
    return {name: {side: _state(name, available[side][name], chosen[side]) for side in SIDES} for name in FLAGS}


def as_json(available: Availability, applied: FlagSet) -> dict[str, Any]:
    """The object that `flags --json` prints."""
    rows = states(available, applied)
    return {
        "flags": [
            {
                "name": name,
                "fidelity": flag.fidelity,
                "scope": flag.scope,
                "help": flag.help,
                "choices": list(flag.choices),
                **{side: asdict(state) for side, state in rows[name].items()},
            }
            for name, flag in FLAGS.items()
        ]
    }


def _state(name: str, reason: str | None, chosen: Mapping[str, str]) -> FlagState:
    if reason is not None:
        return FlagState("unavailable", reason=reason)
    return FlagState("applied", chosen[name] or FLAGS[name].applied) if name in chosen else FlagState("available")
