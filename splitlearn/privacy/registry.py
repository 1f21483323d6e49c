"""Every attack, defined once. To add one, add a module with `prepare` and `run`, and a record here.

`run(capture, checkpoint)` gives what it has recovered. It gets what the trunk server has, and nothing else: a test runs
each attack in a process that has only the capture's file and the model's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from splitlearn.privacy.capture import Capture
    from splitlearn.privacy.checkpoint import Checkpoint

Recovered = tuple[int | None, ...]
"""A token id for each position from 0, None where the attack says nothing."""


@dataclass(frozen=True)
class Attack:
    """One attack. `reads` is what it looks at: the states that were sent, or those that were returned. `learns`:
    whether it needs training text. Its code is the module of its name in this package, which is imported when it is
    first used, so that names can be checked without torch."""

    name: str
    help: str
    reads: Literal["sent", "returned"] = "sent"
    learns: bool = False

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Make what one checkpoint and cut needs once, for any number of captures."""
        self._module.prepare(checkpoint)

    def run(self, capture: Capture, checkpoint: Checkpoint) -> Recovered:
        """The tokens that it recovers."""
        found: Callable[[Capture, Checkpoint], Recovered] = self._module.run
        return found(capture, checkpoint)

    @property
    def _module(self) -> Any:
        return import_module(f"splitlearn.privacy.{self.name}")


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("nearest", "Compares each state with a table of the states of all single tokens."),
        Attack("linear", "Maps states to embeddings by ridge regression, learnt from other text.", learns=True),
        Attack(
            "inverter",
            "Maps the states so far to embeddings by a recurrent network, trained on other text.",
            learns=True,
        ),
        Attack(
            "search",
            "Runs candidates of linear or inverter through the client's layers, behind the prefix recovered so far, "
            "until one gives the state.",
            learns=True,
        ),
        Attack("answer", "Runs the client's last layers and LM head on what the trunk sends back.", reads="returned"),
    )
}
