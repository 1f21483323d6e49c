"""The configured model: its files, how it is split, and what it and this machine allow."""

from dataclasses import dataclass

from splitlearn.arms import capabilities_cache
from splitlearn.arms.capabilities import Capabilities, Question
from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import Config
from splitlearn.errors import InputError
from splitlearn.models.plan import SplitPlan, plan_of
from splitlearn.runtime.progress import Progress


@dataclass(frozen=True)
class Model:
    """`draft` is the draft model, where one is named. `why` says why the cut is this one, where it was planned."""

    files: ModelFiles
    draft: ModelFiles | None
    plan: SplitPlan
    capabilities: Capabilities
    why: str = ""

    @classmethod
    def read(cls, config: Config, progress: Progress) -> "Model":
        """Fetch and convert the weights if the cache lacks them, then read everything else. Takes seconds, at first
        minutes. Raises InputError and ModelError."""
        files, draft = catalogue.prepare(config.model, progress), _draft(config, progress)
        plan = plan_of(config, files.n_layers)
        model = config.model
        question = Question(files, draft, model.device, model.dtype, config.generation.chat)
        return cls(files, draft, plan, capabilities_cache.find(question, catalogue.cache_folder(model), progress))

    def trunk_kv_bytes(self) -> int:
        """What a token takes in the trunk's KV cache."""
        return sum(self.capabilities.kv_bytes[self.plan.start : self.plan.end])


def _draft(config: Config, progress: Progress) -> ModelFiles | None:
    name = config.model.draft
    if name is None:
        return None
    try:
        return catalogue.prepare(config.model.model_copy(update={"name": name}), progress)
    except InputError as error:
        raise InputError("model.draft", error.value, error.expected) from error
