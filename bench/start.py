"""Start-up time of the page: until it answers, until both arms are warm, and from the first click to the first token.

Runs the real `app.py` with config.yaml and drives it over HTTP as a browser would. After each start a process imports
torch and transformers, as a yardstick for the machine. What a click draws is read from the page's own messages.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs

REPEATS = 5
ROOT = Path(__file__).parent.parent
IMPORTS = "import torch, transformers"
API = "/gradio_api"
POLL_S, TIMEOUT_S = 0.1, 600.0
FIRST = re.compile(r'data-state=\\"(?:running|done)\\"')
TTFT = re.compile(r'(Full|Split) model\\" data-state=\\"done\\".*?>TTFT</button>.*?<dd>([\d.]+) (m?s)</dd>')


@dataclass(frozen=True)
class Start:
    """One start of the page, in seconds from its command; `first_token` from the click. `ttft` has what the card of
    each arm shows for the first and for a second click."""

    imports: float
    answers: float
    warm: float
    first_token: float
    ttft: dict[str, tuple[float, float]]


def main(runs: Runs) -> None:
    """Measure and write docs/results/start.md."""
    _imports_s()  # fills the page cache
    starts = [_start() for _ in range(REPEATS)]
    rows = [
        _row("import torch, transformers", starts, lambda each: each.imports),
        _row("until the page and its queue answer", starts, lambda each: each.answers),
        _row("until both arms are warm", starts, lambda each: each.warm),
        _row("from the first click, then, to its first token", starts, lambda each: each.first_token),
        _row("start to first token", starts, lambda each: each.warm + each.first_token),
        _row("TTFT of the first click, full", starts, lambda each: each.ttft["Full"][0]),
        _row("TTFT of a second click, full", starts, lambda each: each.ttft["Full"][1]),
        _row("TTFT of the first click, split", starts, lambda each: each.ttft["Split"][0]),
        _row("TTFT of a second click, split", starts, lambda each: each.ttft["Split"][1]),
    ]
    text = (
        f"Medians of {REPEATS} starts of `python app.py` with the flags `{runs.config.flags}`, weights in the cache. "
        "After each start a fresh process imports torch and transformers; the ratio is to that time, in pairs."
    )
    write("start", "How long the page takes to start", text, rows, environment(runs))


def _row(what: str, starts: list[Start], seconds: Any) -> dict[str, str]:
    values = [seconds(each) for each in starts]
    ratios = [value / each.imports for value, each in zip(values, starts, strict=True)]
    return {
        "what": what,
        "seconds, median": f"{median(values):.2f}",
        "least": f"{min(values):.2f}",
        "most": f"{max(values):.2f}",
        "times the import, median": f"{median(ratios):.2f}",
    }


def _imports_s() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], stdin=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def _start() -> Start:
    with _page() as (began, url), httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT_S) as client:
        assert client.get("/").status_code == 200
        page = client.get("/config").json()
        loading = _call(client, page, "_see")
        answers = time.monotonic() - began
        while "Loading" in loading:
            time.sleep(POLL_S)
            loading = _call(client, page, "_see")
        warm = time.monotonic() - began
        first, second = (_click(client, page) for _ in range(2))
    ttft = {arm: (first[1][arm], second[1][arm]) for arm in ("Full", "Split")}
    print(f"answers {answers:.2f}, warm {warm:.2f}, first token {first[0]:.2f}", flush=True)
    return Start(_imports_s(), answers, warm, first[0], ttft)


@contextmanager
def _page() -> Iterator[tuple[float, str]]:
    """Run the page. Yields when the command began, and the page's address."""
    began = time.monotonic()
    command = [sys.executable, "app.py", "--port", "0"]
    environment = {**os.environ, "SPLITLEARN_AUTH": ""}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield began, process.stdout.readline().split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _click(client: httpx.Client, page: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Seconds from the click to the first token that is drawn, and the TTFT that each card shows at the end."""
    began, first, shown = time.monotonic(), None, dict[str, float]()
    for line in _messages(client, page, "_compare"):
        if first is None and FIRST.search(line):
            first = time.monotonic() - began
        shown |= {arm: float(value) / (1e3 if unit == "ms" else 1) for arm, value, unit in TTFT.findall(line)}
    assert first is not None and len(shown) == 2, "the comparison showed no answer"
    return first, shown


def _call(client: httpx.Client, page: dict[str, Any], name: str) -> str:
    """Call a function of the page and return all that it sends."""
    return "".join(_messages(client, page, name))


def _messages(client: httpx.Client, page: dict[str, Any], name: str) -> Iterator[str]:
    """Call the page's function `name` with its fields' initial values. Yields each message until it ends."""
    function = next(each for each in page["dependencies"] if each["api_name"] == name)
    values = {each["id"]: each["props"].get("value") for each in page["components"]}
    session = uuid.uuid4().hex
    data = [values[number] for number in function["inputs"]]
    call = {"data": data, "fn_index": function["id"], "session_hash": session}
    client.post(f"{API}/queue/join", json=call).raise_for_status()
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield line
                if json.loads(line.removeprefix("data:"))["msg"] == "process_completed":
                    return
