"""The public API of the page, called by name as another program does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import ModelConfig
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy
from tests.conftest import ROOT, TinyFactory
from tests.support.page import START_S, App, running, write_config
from tests.support.trunk import environment, eventually

SHORT = {"prompt": "Why?", "max_new_tokens": 4, "flags": "use_cache", "ignore_eos": True}
EXPERIMENT = {"flags": "use_cache", "max_new_tokens": 4, "prompts": "Why?"}


@dataclass(frozen=True)
class Served:
    """An app with both arms warm."""

    app: App
    url: str
    config: Path

    def client(self) -> Client:
        """Another program."""
        return Client(self.url, verbose=False)

    def command(self, *words: str) -> Any:
        """What the command line prints with the same settings."""
        command = [sys.executable, "-m", "splitlearn", *words, "--json", "--config", str(self.config)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model()


@pytest.fixture(scope="module")
def served(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    config = write_config(folder, model={"name": str(files.folder)})
    with running(config, folder=folder) as app:
        yield Served(app, app.warm_url(), config)


@pytest.fixture(scope="module")
def client(served: Served) -> Client:
    return served.client()


def shape(value: object) -> object:
    """The names in an object, all the way down; a list has the shape of its first element."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def refusal(client: Client, name: str, **changes: object) -> str:
    with pytest.raises(AppError) as refused:
        client.predict(**changes, api_name=name)
    return str(refused.value)


def test_the_public_endpoints_are_these_with_types_and_defaults(client: Client) -> None:
    told: Any = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == {"/compare", "/compare_flags", "/plan_cut", "/models"}
    assert not told["unnamed_endpoints"]
    for name, endpoint in told["named_endpoints"].items():
        assert endpoint["description"], name
        assert all(each["parameter_has_default"] and each["type"] for each in endpoint["parameters"]), name
    compare = {each["parameter_name"]: each for each in told["named_endpoints"]["/compare"]["parameters"]}
    assert compare["top_p"]["python_type"]["type"] == "float"
    assert compare["top_p"]["parameter_default"] == 1.0


def test_what_the_page_calls_has_no_name_for_others(client: Client, served: Served) -> None:
    for name in ("/_compare", "/_begin", "/_stop", "/_start", "/_resume", "/_open", "/_measure", "/lambda"):
        with pytest.raises(ValueError, match="Cannot find a function"):
            client.predict(api_name=name)
    for way in ("run", "call"):
        call = {"data": [], "session_hash": "past"}
        assert httpx.post(f"{served.url}/gradio_api/{way}/_compare", json=call).status_code == 404


def test_compare_gives_the_command_lines_object(client: Client, served: Served) -> None:
    job = client.submit(**SHORT, link="rtt=5ms", api_name="/compare")
    found = job.result()
    words = ("--prompt", "Why?", "--max-new-tokens", "4", "--flags", "use_cache", "--ignore-eos", "--link", "rtt=5ms")
    told = served.command("compare", *words)
    assert shape(found) == shape(told)
    for same in ("model", "split", "prompt", "flags", "flags_by_side", "identical_tokens"):
        assert found[same] == told[same]
    assert found["full"]["token_ids"] == told["full"]["token_ids"]
    assert all(set(step) == {"progress", "tokens"} for step in job.outputs()[:-2])


def test_a_cut_is_planned_and_run(client: Client, files: ModelFiles) -> None:
    found = client.predict(start=1, end=5, context=64, flags="use_cache", measure=True, api_name="/plan_cut")
    model = anatomy.read(files, "float32")
    parts = anatomy.parts_of(model, SplitPlan(1, 5, model.n_layers), 64)
    assert found["anatomy"] == json.loads(json.dumps(asdict(model)))
    assert found["parts"] == [asdict(part) for part in parts]
    assert found["context"] == 64
    assert [(run["start"], run["end"]) for run in found["cuts"]["measured"]] == [(1, 5)]
    assert {(cut["start"], cut["end"]) for cut in found["cuts"]["cuts"]} >= {(1, 5), (2, 4)}


def test_models_are_those_of_the_command_line(client: Client) -> None:
    assert client.predict(api_name="/models") == catalogue.as_json(ModelConfig())


def test_what_cannot_be_used_is_one_line_that_names_it(client: Client, served: Served) -> None:
    said: dict[str, tuple[dict[str, object], str]] = {
        "max_new_tokens": ({"max_new_tokens": "x"}, "a whole number"),
        "prompt": ({"prompt": ["x"]}, "text"),
        "temperature": ({"temperature": -1}, "0"),
        "stop": ({"stop": "x"}, "a list of texts"),
        "chat": ({"chat": 3}, "chat template"),
        "ignore_eos": ({"ignore_eos": "no"}, "true or false"),
        "pairs": ({"pairs": 0}, "from 1 to"),
        "link": ({"link": "rtt=fast"}, "ms"),
        "flags": ({"flags": "warp"}, "expected"),
    }
    for field, (changes, expected) in said.items():
        line = refusal(client, "/compare", **{**SHORT, **changes})
        assert line.startswith(field), line
        assert expected in line
        assert "\n" not in line
    assert refusal(client, "/plan_cut", start=9).startswith("start: 9")
    assert refusal(client, "/plan_cut", client_memory_mb=-1).startswith("client_memory_mb: -1")
    assert refusal(client, "/compare_flags", **{**EXPERIMENT, "pairs": 1}).startswith("pairs: 1")
    assert refusal(client, "/compare_flags", **{**EXPERIMENT, "design": "other"}).startswith("design: 'other'")
    assert not any("Traceback" in line for line in served.app.lines)


def test_compare_flags_gives_the_labs_table(client: Client) -> None:
    *before, table = list(client.submit(**EXPERIMENT, api_name="/compare_flags"))
    assert any("first pass" in step["progress"] for step in before)
    rows = {row["name"]: row["cells"] for row in table["rows"]}
    assert set(rows["without use_cache"]) == {"full", "split"}
    assert rows["without use_cache"]["full"]["tpot_ratio"]["pairs"] == 2
    assert table["blocks"] == 2


def test_while_an_experiment_is_measured_calls_are_refused_and_a_cancelled_one_is_stopped(
    client: Client, served: Served
) -> None:
    job = client.submit(**EXPERIMENT, pairs=10_000, api_name="/compare_flags")
    assert eventually(lambda: any("first pass" in str(step) for step in job.outputs()), START_S)
    other = served.client()
    assert "The machine is measuring an experiment" in refusal(other, "/compare", **SHORT)
    assert "The machine is measuring an experiment" in refusal(other, "/plan_cut")
    assert "Another experiment is running" in refusal(other, "/compare_flags", **EXPERIMENT)
    job.cancel()
    assert eventually(lambda: _compares(other), START_S)


def _compares(client: Client) -> bool:
    try:
        return bool(client.predict(**SHORT, api_name="/compare")["identical_tokens"])
    except AppError:
        return False
