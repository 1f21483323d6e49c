"""The actions of the Lab tab: start, resume, open and compare experiments. Nothing of Gradio here."""

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

# Limit of the page; the command line has none.
MOST_EXPERIMENTS = 500


@dataclass(frozen=True)
class ExperimentView:
    """An experiment's findings, and its exported files by name."""

    name: str
    findings: Findings
    files: Mapping[str, Path]


class Lab:
    """Actions on `job` and on the saved experiments. Exports are written into `downloads`."""

    def __init__(self, job: Job, downloads: Downloads) -> None:
        self.job = job
        self._downloads = downloads

    def start(self, typed: Mapping[str, Any], flags: str, prompt: str) -> None:
        """Start an experiment. Raises InputError for an invalid field; SetupError while another runs, or if there are
        MOST_EXPERIMENTS, so that visitors cannot fill the disk."""
        if len(self.saved()) >= MOST_EXPERIMENTS:
            folder = self.job.folder.resolve()
            raise SetupError(f"There are {MOST_EXPERIMENTS} experiments in {folder}. Remove some, then start again.")
        self.job.start(inputs.experiment(typed, flags, prompt))

    def preflight(self, typed: Mapping[str, Any], flags: str, prompt: str) -> list[str]:
        """What the experiment will take, in sentences. Takes a second to see how busy the machine is. Raises as
        `start`."""
        return self.job.preflight(inputs.experiment(typed, flags, prompt)).lines()

    def resume(self, name: str | None) -> None:
        """Resume the experiment called `name`."""
        self.job.resume(self._folder(name))

    def saved(self) -> list[SavedExperiment]:
        """The saved experiments, newest first."""
        return saved_experiments(self.job.folder)

    def open(self, name: str | None, typed: Mapping[str, Any], visitor: str) -> ExperimentView:
        """Open the experiment called `name` with the service level in `typed`. Raises SetupError while one runs."""
        self._must_be_quiet()
        findings = read_experiment(self._folder(name), inputs.service_level(typed))
        # A folder for each visitor: two may open one experiment with different service levels at the same time.
        with self._downloads.fresh(visitor) as folder:
            files = exports.write_exports(findings, folder)
        return ExperimentView(str(name), findings, {path.name: path for path in files})

    def compare(self, name: str | None, other: str | None, typed: Mapping[str, Any]) -> str:
        """A comparison of two experiments, as Markdown."""
        self._must_be_quiet()
        service = inputs.service_level(typed)
        return exports.compare_two(*(read_experiment(self._folder(each), service) for each in (name, other)))

    def _folder(self, name: str | None) -> Path:
        """The folder of a saved experiment. A name from the browser is never used as a path."""
        for experiment in self.saved():
            if experiment.folder.name == name:
                return experiment.folder
        raise InputError("experiment", name or "", "one of the list")

    def _must_be_quiet(self) -> None:
        if self.job.running:
            raise SetupError("The machine is measuring an experiment; drawing another one now would disturb it.")
