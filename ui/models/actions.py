"""What the panel "Choose another model" does. Nothing of Gradio here."""

from collections.abc import Iterator, Sequence

from splitlearn.arms import model_choice
from splitlearn.arms.model_choice import Choice
from splitlearn.arms.startup import Startup
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.runtime.progress import Step
from ui.model.actions import Planner, follow


class Chooser:
    """The model of `startup`. `planner` knows whether the machine is free, and forgets the model that goes.

    `failures` has what the last try said, by the name of the model.
    """

    def __init__(self, startup: Startup, planner: Planner) -> None:
        self.planner, self._startup, self._first = planner, startup, startup.runs.config
        self.failures: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The model in use, by the name that its choice has."""
        return self._startup.runs.config.model.name

    @property
    def fixed(self) -> str:
        """Why no other model can be chosen, whoever asks; empty where one can."""
        trunk = self._startup.runs.config.trunk
        if trunk.embedded:
            return ""
        return (
            f"The trunk server at {', '.join(trunk.address)} has this model alone. For another one, start that server "
            "and this page with another model.name."
        )

    def choices(self, probe: bool) -> Sequence[Choice]:
        """Every model, and why one cannot be had; with `probe` the model hub is asked, which may take seconds."""
        return model_choice.choices(self._first, self._startup.runs, probe)

    def choose(self, name: object, visitor: str) -> Iterator[Step]:
        """Load the model called `name` for every visitor; a step for each thing worth saying. Raises InputError for one
        that is not in the list, and what loading raises."""
        if self.fixed:
            raise SetupError(self.fixed)
        if name == self.name and not self._startup.failure:
            raise InputError("Model", name, "another one than the one in use")
        if name not in [choice.name for choice in self.choices(probe=False)]:
            raise InputError("Model", name, "one of the list")
        stop = yield from self.planner.ready(visitor)
        chosen, before = str(name), self._digest()
        try:
            yield from follow(
                lambda progress: model_choice.load(self._startup, self._first, chosen, progress, stop), stop
            )
            self.failures.pop(chosen, None)
        except SplitlearnError as error:
            self.failures[chosen] = str(error)
            raise
        finally:
            if self._digest() != before:
                self.planner.forget()

    def _digest(self) -> str:
        """What tells the model in use from others; empty while there is none."""
        return "" if self._startup.failure else self._startup.runs.files.digest
