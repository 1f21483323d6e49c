"""The public API of the page, called by name as another program does, through a proxy with a path of its own."""

import asyncio
import json
import re
import runpy
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.config import ModelConfig
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy
from splitlearn.runtime import private_apis
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.forks import printed
from tests.support.page import START_S, App, running, write_config
from tests.support.sub_path import proxied
from tests.support.trunk import eventually
from ui.guard.hosts import Hosts
from ui.guard.security import guarded
from ui.login import Sharing

SHORT = {"prompt": "Why?", "max_new_tokens": 4, "flags": "use_cache", "ignore_eos": True}
PATH, LOGIN = "/lab", ("ada", "cobalt-Harbor-42")
BLOCKS = re.findall(r"```python( mcp)?\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
HAS_MCP = find_spec("mcp") is not None
needs_mcp = pytest.mark.skipif(not HAS_MCP, reason="needs the package mcp (docs/api.md)")
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
        arguments = [*words, "--json", "--config", str(self.config)]
        return json.loads(printed(command_line.main, arguments, ROOT, self.config.with_name("errors")))


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model()


@pytest.fixture(scope="module")
def served(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    ui = {"port": 0, "root_path": PATH, "mcp": HAS_MCP}
    config = write_config(folder, model={"name": str(files.folder)}, ui=ui)
    # A cache of its own: an experiment of somebody else on this machine is none of this page's.
    own = {"SPLITLEARN_CACHE": str(folder / "cache")}
    with running(config, environment=own, folder=folder) as app, proxied(app.warm_url(), PATH) as url:
        yield Served(app, url, config)


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


def test_models_are_those_of_the_command_line(client: Client, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(served.config.parent / "cache"))
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


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=needs_mcp if kind else ()) for kind, block in BLOCKS],
    ids=range(len(BLOCKS)),
)
def test_the_examples_of_the_docs_run_as_written(
    block: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITLEARN_PAGE", served.url)
    (tmp_path / "script.py").write_text(block, encoding="utf-8")
    left = runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "compare_flags" in said if "mcp" in block else said.strip()
    if "/compare_flags" in block:
        check_table(left["job"].outputs())


def check_table(steps: Sequence[Any]) -> None:
    """What compare_flags yields for use_cache and two pairs: how far it is, at last the lab's table."""
    *before, table = steps
    assert any("first pass" in step["progress"] for step in before)
    rows = {row["name"]: row["cells"] for row in table["rows"]}
    assert set(rows["without use_cache"]) == {"full", "split"}
    assert rows["without use_cache"]["full"]["tpot_ratio"]["pairs"] == 2
    assert table["blocks"] == 2


@needs_mcp
def test_the_mcp_tools_are_the_endpoints_and_say_what_cannot_be_used(served: Served) -> None:
    async def ask(session: Any) -> None:
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert set(tools) == {"compare", "compare_flags", "plan_cut", "models"}
        assert "1 to 100" in tools["compare"].inputSchema["properties"]["pairs"]["description"]
        refused = await session.call_tool("compare", {"max_new_tokens": 0})
        assert refused.isError
        assert "max_new_tokens: 0 cannot be used" in refused.content[0].text

    asyncio.run(_over_mcp(served.url, ask))


@needs_mcp
def test_of_mcp_only_its_one_path_is_there_and_for_no_other_site(served: Served) -> None:
    for path in ("mcp/sse", "mcp/schema", "mcp/messages/", "mcp/http"):
        assert httpx.get(f"{served.url}/gradio_api/{path}").status_code == 404
    for headers in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert httpx.post(f"{served.url}/gradio_api/mcp/", json={}, headers=headers).status_code == 403
    assert (
        httpx.post(f"{served.url}/gradio_api/mcp/", json={}, headers={"Host": "elsewhere.example"}).status_code == 400
    )


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """A page with one endpoint behind guard and login."""

    def double(number: int = 1) -> int:
        """Twice the number."""
        return 2 * number

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.api(double)
    blocks.queue(api_open=False)
    lifespan = guarded(Hosts("127.0.0.1", (), Sharing.of(False)))
    quiet = {"quiet": True, "prevent_thread_lock": True, "ssr_mode": False, "run_history": False}
    blocks.launch(auth=LOGIN, mcp_server=HAS_MCP, app_kwargs={"lifespan": lifespan}, **quiet)
    if HAS_MCP:
        private_apis.mcp_calls_as(blocks, LOGIN)
    yield blocks.local_url.rstrip("/")
    blocks.close(verbose=False)


def test_where_there_is_a_login_a_program_has_to_log_in(locked: str) -> None:
    with pytest.raises(ValueError, match="login"):
        Client(locked, verbose=False)
    with pytest.raises(ValueError, match="login"):
        Client(locked, auth=("ada", "wrong"), verbose=False)
    assert Client(locked, auth=LOGIN, verbose=False).predict(21, api_name="/double") == 42


@needs_mcp
def test_where_there_is_a_login_an_mcp_client_has_to_log_in(locked: str) -> None:
    assert httpx.post(f"{locked}/gradio_api/mcp/", json={}).status_code == 401
    answer = httpx.post(f"{locked}/login", data=dict(zip(("username", "password"), LOGIN, strict=True)))
    cookie = "; ".join(each.partition(";")[0] for each in answer.headers.get_list("set-cookie"))

    async def ask(session: Any) -> None:
        assert (await session.call_tool("double", {"number": 21})).content[0].text == "42"

    asyncio.run(_over_mcp(locked, ask, {"Cookie": cookie}))


async def _over_mcp(url: str, ask: Callable[[Any], Awaitable[None]], headers: dict[str, str] | None = None) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    address = f"{url}/gradio_api/mcp/"
    async with streamablehttp_client(address, headers) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        await ask(session)
