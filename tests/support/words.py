"""The settings records of flags, which are named by their words, and the engine of a stage that torch computes."""

from collections.abc import Iterable

from splitlearn.flags.registry import settings
from splitlearn.generation.settings import GenerationSettings
from splitlearn.stages.engine import EagerEngine
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import LoadSettings, SessionSettings


def load_of(words: Iterable[str]) -> LoadSettings:
    """How weights are loaded."""
    return settings(frozenset(words)).load


def session_of(words: Iterable[str]) -> SessionSettings:
    """How a session computes."""
    return settings(frozenset(words)).session


def generation_of(words: Iterable[str]) -> GenerationSettings:
    """How an answer is generated."""
    return settings(frozenset(words)).generation


def eager_of(stage: LocalStage) -> EagerEngine:
    """The engine of a stage that torch computes."""
    assert isinstance(stage.eager, EagerEngine)
    return stage.eager
