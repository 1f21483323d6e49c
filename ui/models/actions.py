"""The actions of the panel "Choose another model". Nothing of Gradio here."""

from collections.abc import Iterator, Sequence

from splitlearn.arms import model_choice
from splitlearn.arms.model_choice import Choice
from splitlearn.arms.startup import Startup
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.runtime.progress import Step
from ui.model.actions import Planner, follow


class Chooser:
    """The model of `startup`. `planner` knows whether the machine is free.

    `failures` has the error of a model's last load, by name.
    """

    def __init__(self, startup: Startup, planner: Planner) -> None:
        self.planner, self._startup, self._first = planner, startup, startup.configured
        self.failures: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The name of the model in use, as in `choices`."""
        return self._startup.runs.config.model.name

    @property
    def fixed(self) -> str:
        """Why nobody can choose another model; empty if one can be chosen."""
        trunk = self._startup.runs.config.trunk
        if trunk.embedded:
            return ""
        return (
            f"The trunk server at {trunk.place} has this model alone. For another one, start that server "
            "and this page with another model.name."
        )

    def choices(self, probe: bool) -> Sequence[Choice]:
        """All models, with the reason if one is unavailable. `probe` asks the model hub, which may take seconds."""
        return model_choice.choices(self._first, self._startup.runs, probe)

    def choose(self, name: object, visitor: str) -> Iterator[Step]:
        """Load the model called `name` for every visitor. Yields progress. Raises InputError if it is not in the list,
        and what loading raises."""
        if self.fixed:
            raise SetupError(self.fixed)
        if name == self.name and not self._startup.failure:
            raise InputError("Model", name, "another one than the one in use")
        if name not in [choice.name for choice in self.choices(probe=False)]:
            raise InputError("Model", name, "one of the list")
        stop = yield from self.planner.ready(visitor)
        chosen = str(name)
        try:
            yield from follow(
                lambda progress: model_choice.load(self._startup, self._first, chosen, progress, stop), stop
            )
            self.failures.pop(chosen, None)
        except SplitlearnError as error:
            self.failures[chosen] = str(error)
            raise
