"""Fixtures that several test files share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitlearn import models, progress
from splitlearn.config import ModelConfig
from splitlearn.store import ModelFiles
from tests.tiny import make_converted

TinyFactory = Callable[..., ModelFiles]


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The catalogue's default model, fetched on first use; a test that asks for it is marked `weights`."""
    with progress.on_console() as show:
        return models.prepare(ModelConfig(), show)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny_model(model_type="llama", n_layers=6, chat=True)`: its converted folder, made once for each choice."""
    made: dict[tuple[str, int, bool], ModelFiles] = {}

    def make(model_type: str = "llama", n_layers: int = 6, chat: bool = True) -> ModelFiles:
        key = (model_type, n_layers, chat)
        if key not in made:
            folder: Path = tmp_path_factory.mktemp("tiny") / model_type
            made[key] = make_converted(folder, model_type, n_layers, chat)
        return made[key]

    return make
