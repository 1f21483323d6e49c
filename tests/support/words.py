"""The settings records of flags, which are named by their words."""

from collections.abc import Iterable

from splitlearn.flags.registry import settings
from splitlearn.generation.settings import GenerationSettings
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
