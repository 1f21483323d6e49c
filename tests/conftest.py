"""Fixtures that several test files share.

The process that hands out tests to others (pytest-xdist) imports this file and runs none: what takes seconds to import
is imported by the fixtures that need it.
"""

import gc
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from splitlearn.checkpoints import catalogue
from splitlearn.config import ModelConfig
from splitlearn.runtime import private_apis, progress, proxies
from tests.support.scheduling import DURATIONS, Durations

if TYPE_CHECKING:
    from splitlearn.checkpoints.folder import ModelFiles
    from tests.support.trunk import TrunkHere

TinyFactory = Callable[..., "ModelFiles"]
proxies.settle()  # for what tests themselves ask on this machine
# A slow or busy machine is no failure: neither a deadline nor a health check looks at the clock.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], database=None
)
hypothesis.settings.load_profile("any speed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of the tests' own."""
    parser.addoption("--record-durations", action="store_true", help=f"write what each file took to {DURATIONS}")


def pytest_configure(config: pytest.Config) -> None:
    """Files that take long begin first. Test processes import models as the program's own processes do."""
    if in_worker := hasattr(config, "workerinput"):
        private_apis.without_scipy()
    config.pluginmanager.register(Durations(record=config.getoption("--record-durations") and not in_worker))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test files import Gradio as the page does."""
    with private_apis.without_stub_files():
        return (yield)


def pytest_collection_finish() -> None:
    """All that was imported stays, so the garbage collector need not look through it again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Each test begins with one thread for torch. Tiny models gain nothing by a second one, and two test processes that
    share two cores then wait for each other at every product: tests/stages/test_boundaries.py took four times as long.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def default_model() -> "ModelFiles":
    """The catalogue's default model, fetched on first use; a test that asks for it is marked `weights`."""
    with progress.on_console() as show:
        return catalogue.prepare(ModelConfig(), show)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny_model(model_type="llama", n_layers=6, chat=True)`: its converted folder, made once for each choice."""
    from tests.support.tiny import make_converted

    made: dict[tuple[str, int, bool], ModelFiles] = {}

    def make(model_type: str = "llama", n_layers: int = 6, chat: bool = True) -> "ModelFiles":
        key = (model_type, n_layers, chat)
        if key not in made:
            folder: Path = tmp_path_factory.mktemp("tiny") / model_type
            made[key] = make_converted(folder, model_type, n_layers, chat)
        return made[key]

    return make


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> "ModelFiles":
    """A tiny Llama, for the files that need no other model."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def here(files: "ModelFiles") -> "Iterator[TrunkHere]":
    """A trunk server of `files` in this process."""
    from tests.support.trunk import serve_here

    with serve_here(files) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own; where the converted folders come."""
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"
