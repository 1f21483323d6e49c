"""Another model in the place of the one in use: what can be had, what is refused before anything ends, what fails."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlearn import config
from splitlearn.arms import model_choice
from splitlearn.arms.model_choice import choices, load, settings_for
from splitlearn.arms.report import ArmReport
from splitlearn.arms.startup import Startup
from splitlearn.checkpoints import download, folder
from splitlearn.checkpoints.folder import CONFIG, WEIGHTS
from splitlearn.errors import SetupError, SplitlearnError, WeightsDamaged
from splitlearn.events import KINDS, GenerationRequest
from splitlearn.runtime.progress import Step, silent
from tests.conftest import TinyFactory
from tests.support.trunk import settings

REQUEST = GenerationRequest("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)
FLAGS = "use_cache,inference_mode"


@pytest.fixture(scope="module")
def cache(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a GPT-2, one whose weights are damaged, one of which only loading the arms can tell, and a part."""
    made = tmp_path_factory.mktemp("cache") / "v1"
    for name in ("other", "damaged", "unloadable", "owner--other@2-4"):
        shutil.copytree(tiny_model("gpt2").folder, made / name)
    weights = made / "damaged" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    return made


@pytest.fixture(scope="module")
def startup(tiny_model: TinyFactory, cache: Path) -> Iterator[Startup]:
    """A program with a Llama, whose arms are warm. Nothing is fetched: no hub can be reached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITLEARN_CACHE", str(cache.parent))
        patch.setattr(download, "unavailable", lambda source: "the model hub cannot be reached")
        made = Startup(config.parse({**settings(tiny_model("llama")), "flags": FLAGS}))
        try:
            made.begin()
            made.wait(threading.Event())
            yield made
        finally:
            made.close()


@pytest.fixture
def first(startup: Startup) -> config.Config:
    return startup.runs.config


def tokens(startup: Startup) -> dict[str, tuple[int, ...]]:
    """What each arm generates."""
    runs = startup.runs
    found: dict[str, tuple[int, ...]] = {}
    for kind in KINDS:
        *_, last = runs.stream(kind, runs.flags(FLAGS), REQUEST)
        assert isinstance(last, ArmReport)
        found[kind] = last.metrics.token_ids
    return found


def test_the_list_has_the_model_in_use_the_catalogue_and_the_cache_with_the_reason_for_what_cannot_be_had(
    startup: Startup, first: config.Config, cache: Path
) -> None:
    found = {choice.name: choice for choice in choices(first, startup.runs, probe=True)}
    assert list(found)[0] == first.model.name
    assert {str(cache / name) for name in ("other", "damaged")} < set(found)
    assert str(cache / "owner--other@2-4") not in found
    assert "hub cannot be reached" in found["gpt2"].why_not
    assert found[first.model.name].why_not == found[str(cache / "other")].why_not == ""
    assert found[first.model.name].status.parameters == folder.parameters(startup.runs.files.folder)
    assert choices(first, startup.runs, probe=False)[1].why_not == ""


def test_what_does_not_fit_into_memory_or_is_damaged_is_refused_and_nothing_has_ended(
    startup: Startup, first: config.Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, answers = startup.runs.pids(), tokens(startup)
    with pytest.raises(WeightsDamaged, match="SHA-256|bytes"):
        load(startup, first, str(cache / "damaged"), silent, threading.Event())
    monkeypatch.setattr(model_choice, "memory", lambda runs: 1000)
    with pytest.raises(SetupError, match="GB of memory"):
        load(startup, first, str(cache / "other"), silent, threading.Event())
    assert "GB of memory" in choices(first, startup.runs, probe=False)[0].why_not
    stopped = threading.Event()
    stopped.set()
    assert not load(startup, first, str(cache / "other"), silent, stopped)
    assert (startup.runs.pids(), tokens(startup)) == (before, answers)


def test_a_model_whose_arms_cannot_be_loaded_leaves_the_one_before_in_use(
    startup: Startup, first: config.Config, cache: Path
) -> None:
    answers, broken = tokens(startup), cache / "unloadable"

    def damage(step: Step) -> None:
        """Between the look at the memory and the loading, another program writes nonsense into the weights."""
        if "memory" in step.label:
            (broken / WEIGHTS).write_bytes(b"\xff" * 100)
            (broken / CONFIG).write_text("{}")

    with pytest.raises(SplitlearnError, match=f"could not be loaded, and {first.model.name} is in use again"):
        load(startup, first, str(broken), damage, threading.Event())
    assert tokens(startup) == answers


def test_another_model_is_loaded_for_both_arms_with_its_usual_cut_and_the_first_one_again(
    startup: Startup, first: config.Config, cache: Path
) -> None:
    answers, said = tokens(startup), []
    assert load(startup, first, str(cache / "other"), lambda step: said.append(step.label), threading.Event())
    runs = startup.runs
    assert (runs.files.facts.model_type, runs.plan.start, runs.plan.end) == ("gpt2", 2, 4)
    other = tokens(startup)
    assert other["full"] == other["split"] != answers["full"]
    assert any("trunk server: loading" in label for label in said)
    assert load(startup, first, first.model.name, silent, threading.Event())
    assert tokens(startup) == answers


def test_settings_of_the_configured_model_alone_do_not_follow_another_one(first: config.Config) -> None:
    own = config.parse(
        {
            **first.model_dump(),
            "model": {"name": "one", "draft": "small"},
            "split": {"start": 1, "end": 2},
            "generation": {"chat": "rag"},
        }
    )
    other = settings_for(own, "another")
    assert (other.model.draft, other.cut.start, other.generation.chat) == (None, None, True)
    assert settings_for(own, "one") == own
