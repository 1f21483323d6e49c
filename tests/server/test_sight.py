"""What a trunk server tells of itself: metrics after known traffic, its log, its metrics port, a real Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from server.monitoring.metrics import ENDS, GAUGES, REFUSALS, Metrics
from server.monitoring.prefix_metrics import PrefixCollector
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.probe import TrunkProbe
from splitlearn.kvcache.prefix_store import PrefixStore
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.trunk import Raw, Trunk, eventually, hidden, opening, serve, settings, step
from ui.trunk.monitor import Series, parse, quantile

LAYERS = {"start": 2, "end": 4}
PAGE = ROOT / "docs" / "server-metrics.md"


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trunk(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    limits = {"metrics_port": 0, "max_sessions": 2, "max_waiting": 0}
    with serve(settings(files, split=LAYERS, server=limits), tmp_path_factory.mktemp("trunk")) as running:
        yield running


def counted(trunk: Trunk) -> dict[Series, float]:
    probe = TrunkProbe()
    try:
        return parse(probe.snapshot([trunk.address]).metrics)
    finally:
        probe.close()


def value(found: dict[Series, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def logged(trunk: Trunk) -> list[dict[str, Any]]:
    lines = trunk.errors.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def metrics_url(trunk: Trunk) -> str:
    assert eventually(lambda: any(line["event"] == "serving" for line in logged(trunk)))
    return "http://" + str(next(line for line in logged(trunk) if line["event"] == "serving")["metrics"])


def test_metrics_and_log_are_exactly_what_happened(trunk: Trunk, files: ModelFiles) -> None:
    with Raw(trunk.address) as first, Raw(trunk.address) as second:
        first.ask(opening(files))
        second.ask(opening(files))
        first.ask(step(hidden(files, 5), 0))
        first.ask(step(hidden(files, 1), 5, 2))
        second.ask(step(hidden(files, 4), 0, answer_last=1))
        during = counted(trunk)
        with Raw(trunk.address) as third:
            assert third.refusal(opening(files))[0].name == "RESOURCE_EXHAUSTED"
        first.end()
        assert eventually(lambda: value(counted(trunk), "sessions_closed_total", cause="done") == 1)
        assert second.refusal(step(hidden(files, 1), 9, 2))[0].name == "INVALID_ARGUMENT"
    with Raw(trunk.address) as other:
        other.refusal(opening(files, digest="a name that is nowhere else"))
    assert (value(during, "sessions"), value(during, "sessions_limit"), value(during, "kv_blocks_used")) == (2, 2, 2)
    assert eventually(lambda: value(counted(trunk), "sessions_closed_total", cause="refused") == 1)
    after = counted(trunk)
    assert value(after, "sessions_opened_total") == 2
    assert {end: value(after, "sessions_closed_total", cause=end) for end in ENDS} == {
        "done": 1, "gone": 0, "refused": 1, "failed": 0
    }  # fmt: skip
    refused = {dict(labels)["cause"]: n for (name, labels), n in after.items() if name == "refusals_total" and n}
    assert refused == {"queue_full": 1, "position": 1, "mismatch": 1}
    tokens = {kind: value(after, "tokens_total", kind=kind) for kind in ("prompt", "decode", "replay")}
    assert tokens == {"prompt": 5, "decode": 2, "replay": 3}
    assert (value(after, "forward_seconds_count"), value(after, "step_wait_seconds_count")) == (3, 3)
    assert (value(after, "sessions"), value(after, "kv_blocks_used"), value(after, "steps_waiting")) == (0, 0, 0)
    sent_up = sum(map(len, [opening(files)] * 3)) + len(step(hidden(files, 5), 0))
    assert value(after, "received_bytes_total") > sent_up
    closed = [line for line in logged(trunk) if line["event"] == "session closed"]
    assert [(line["end"], line["tokens_in"], line["tokens_out"], line["peer"]) for line in closed] == [
        ("done", 6, 6, "127.0.0.1"), ("refused", 4, 1, "127.0.0.1")
    ]  # fmt: skip
    assert [line["cause"] for line in logged(trunk) if line["event"] == "refused"] == [
        "queue_full", "position", "mismatch"
    ]  # fmt: skip
    assert "nowhere else" not in trunk.errors.read_text() + "".join(map(str, after))


def test_the_port_shows_the_same_and_listens_on_loopback_only(trunk: Trunk) -> None:
    with urllib.request.urlopen(metrics_url(trunk) + "/metrics", timeout=10) as answer:
        shown = parse(answer.read().decode())
    assert set(shown) == set(counted(trunk))
    here = [
        at.laddr.ip.removeprefix("::ffff:")
        for at in psutil.Process(trunk.process.pid).net_connections("tcp")
        if at.status == "LISTEN"
    ]
    assert len(here) == 2
    assert set(here) == {"127.0.0.1"}


def test_a_port_that_is_taken_is_one_clear_line(files: ModelFiles, tmp_path: Path) -> None:
    from tests.support.trunk import start

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(settings(files, split=LAYERS, server={"metrics_port": port}), tmp_path, "--port", "0")
        assert process.wait(60) == 2
    assert "error: server.metrics_port: cannot listen on" in (tmp_path / "server.err").read_text()
    assert process.stdout is not None
    process.stdout.close()


def test_the_page_in_the_docs_lists_every_metric_and_cause() -> None:
    metrics = Metrics()
    metrics.show({name: lambda: 0.0 for name in GAUGES}, {})
    metrics.registry.register(PrefixCollector(lambda: PrefixStore([])))
    own = [family for family in metrics.registry.collect() if family.name.startswith("splitlearn_trunk_")]
    rows = [f"| `{each.name}` | {each.type} | {each.documentation} |" for each in own]
    rows += [f"| `{cause}` | {code} | {said} |" for cause, (code, said) in REFUSALS.items()]
    text = PAGE.read_text(encoding="utf-8")
    assert not [row for row in rows if row not in text]


def test_a_quantile_is_read_off_the_buckets() -> None:
    grown: dict[Series, float] = {
        ("x_bucket", (("le", le),)): n for le, n in (("1.0", 10.0), ("2.0", 20.0), ("+Inf", 20.0))
    }
    assert quantile(grown, "x", 0.5) == pytest.approx(1.0)
    assert quantile(grown, "x", 0.75) == pytest.approx(1.5)
    assert quantile(dict.fromkeys(grown, 0.0), "x", 0.5) is None


def test_a_real_prometheus_scrapes_it(trunk: Trunk, files: ModelFiles, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("Debian's package prometheus is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load((ROOT / "docs" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [metrics_url(trunk).removeprefix("http://")]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    words = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", *words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    query = urllib.parse.urlencode({"query": "splitlearn_trunk_sessions"})

    def found() -> list[str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=5) as answer:
                return [each["value"][1] for each in json.load(answer)["data"]["result"]]
        except (urllib.error.URLError, ConnectionError):
            return []

    try:
        with Raw(trunk.address) as raw:
            raw.ask(opening(files))
            assert eventually(lambda: found() == ["1"], 40), (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)


def test_the_log_is_one_object_a_line(trunk: Trunk) -> None:
    lines = trunk.errors.read_text().splitlines()
    began = next(at for at, line in enumerate(lines) if line.startswith("{"))
    for line in lines[began:]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", json.loads(line)["time"])
