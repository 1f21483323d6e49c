"""What the Lab tab does when a person acts: experiments are begun, resumed, opened and held against each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.errors import InputError, SetupError
from splitlearn.lab.analysis.findings import Findings
from splitlearn.lab.job import Job, SavedExperiment, read_experiment, saved_experiments
from splitlearn.lab.report import exports
from ui import inputs
from ui.visitors import Downloads

# Of the page alone: on the command line a person says herself where an experiment goes.
MOST_EXPERIMENTS = 500


@dataclass(frozen=True)
class Opened:
    """An experiment as it is shown: what it found, and its exports by their names."""

    name: str
    findings: Findings
    files: Mapping[str, Path]


class Lab:
    """The actions on `job` and on what is kept beside its experiments. Exports are written into `downloads`."""

    def __init__(self, job: Job, downloads: Downloads) -> None:
        self.job = job
        self._downloads = downloads

    def start(self, typed: Mapping[str, Any], flags: str, prompt: str) -> None:
        """Begin what was typed. Raises InputError for a field that cannot be used, SetupError while another runs, and
        where there are MOST_EXPERIMENTS: a visitor does not fill the disk."""
        if len(self.saved()) >= MOST_EXPERIMENTS:
            folder = self.job.folder.resolve()
            raise SetupError(f"There are {MOST_EXPERIMENTS} experiments in {folder}. Remove some, then start again.")
        self.job.start(inputs.asked(typed, flags, prompt))

    def preflight(self, typed: Mapping[str, Any], flags: str, prompt: str) -> list[str]:
        """What the experiment will take, in sentences. Looks a second how busy the machine is. Raises as `start`."""
        return self.job.preflight(inputs.asked(typed, flags, prompt)).lines()

    def resume(self, name: str | None) -> None:
        """Go on with the experiment called `name`."""
        self.job.resume(self._folder(name))

    def saved(self) -> list[SavedExperiment]:
        """The experiments that there are, newest first."""
        return saved_experiments(self.job.folder)

    def open(self, name: str | None, typed: Mapping[str, Any], visitor: str) -> Opened:
        """The experiment called `name` under the service level that was typed. Raises SetupError while one runs."""
        self._must_be_quiet()
        findings = read_experiment(self._folder(name), inputs.service_level(typed))
        # A folder for each visitor: two may look at one experiment under two service levels at the same time.
        files = exports.write_exports(findings, self._downloads.fresh(visitor))
        return Opened(str(name), findings, {path.name: path for path in files})

    def beside(self, name: str | None, other: str | None, typed: Mapping[str, Any]) -> str:
        """Two experiments held against each other, as Markdown."""
        self._must_be_quiet()
        service = inputs.service_level(typed)
        return exports.compare_two(*(read_experiment(self._folder(each), service) for each in (name, other)))

    def _folder(self, name: str | None) -> Path:
        """Only what is in the list: a name from the browser is no path."""
        for experiment in self.saved():
            if experiment.folder.name == name:
                return experiment.folder
        raise InputError("experiment", name or "", "one of the list")

    def _must_be_quiet(self) -> None:
        if self.job.running:
            raise SetupError("The machine is measuring an experiment; drawing another one now would disturb it.")
