"""How much the page slows a measurement: a comparison drawn by a browser, against the same one over the API with no
page open, and against the command line.

The real app restarts in each block, since two processes of one program differ by a percent for as long as they live.
The first two share the app's warm workers and run several times in random order; the command has its own processes.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from gradio_client import Client
from playwright.sync_api import BrowserContext, Page, expect

from bench.pairs import blocks as in_blocks
from bench.ratios import both, ratio
from bench.reference import Generated
from bench.report import write
from splitlearn.arms.compare import KINDS, environment
from splitlearn.arms.runs import Runs
from tests.support import ROOT
from tests.support.page import chromium, open_page, running

RUNS = 3
PAGE, API, COMMAND = "page", "no page", "command line"
RATIOS = ((PAGE, API), (PAGE, COMMAND), (API, COMMAND))
RUN_MS = 120_000
# Time for a new page to finish loading, which is not part of the cost of drawing.
SETTLED_S = 2.0


@dataclass(frozen=True)
class Answer:
    """One run of each arm. `texts` must be equal wherever it ran: text and number of tokens of each arm."""

    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    texts: tuple[tuple[str, int], ...]


def main(runs: Runs, blocks: int = 12) -> None:
    """Measure and write docs/results/page_cost.md."""
    found: dict[str, list[list[Answer]]] = {PAGE: [], API: [], COMMAND: []}
    with chromium() as browser:
        browser.add_init_script("localStorage.clear()")  # each visitor has her own history
        for block in range(blocks):
            for name, answers in _block(browser, block).items():
                found[name].append(answers)
            print(f"block {block + 1} of {blocks}", flush=True)
    same = len({each.texts for blocks_of in found.values() for answers in blocks_of for each in answers}) == 1
    medians = {
        f"{name} {kind}": [_median(answers, kind) for answers in found[name]] for name in found for kind in KINDS
    }
    text = (
        f"The default prompt, flags `{runs.config.flags}`. In each of {blocks} blocks `python app.py` starts anew; "
        f"{RUNS} comparisons on its page and {RUNS} over its API with no page open run in random order, and before "
        f"or after them, at random, `python -m splitlearn compare --pairs {RUNS}`. On the page a fresh visitor presses "
        "Compare each time, and Chromium draws the answers as they come, on the same cores. A block's figure is the "
        f"median of {RUNS}; geometric mean ratios with 95% intervals over the blocks. Text and number of tokens of "
        f"all runs: {'identical' if same else 'NOT identical'}; full and split had the same token ids in each."
    )
    rows = [_row(medians, name, baseline, kind) for kind in KINDS for name, baseline in RATIOS]
    write("page_cost", "What the page costs a measurement", text, rows, environment(runs))


def _block(browser: BrowserContext, block: int) -> dict[str, list[Answer]]:
    """The answers of one start of the app, and of one of the command, in random order."""
    dice, found = random.Random(block), dict[str, list[Answer]]()
    with running(ROOT / "config.yaml", "--port", "0", fresh=True) as app:
        url = app.warm_url()
        client = Client(url, verbose=False)
        arms: dict[str, Callable[[], Answer]] = {
            PAGE: partial(_in_browser, browser, url),
            API: lambda: _of_json(client.predict(pairs=1, api_name="/compare")),
        }
        steps: list[Callable[[], dict[str, list[Answer]]]] = [
            lambda: in_blocks(arms, RUNS, seed=block, say=lambda text: None),
            lambda: {COMMAND: _of_command()},
        ]
        arms[API]()  # a warm-up
        for step in dice.sample(steps, len(steps)):
            found |= step()
    return found


def _in_browser(browser: BrowserContext, url: str) -> Answer:
    """Press Compare as a fresh visitor, and read the answer from the files that the page offers."""
    page = open_page(browser, url)
    try:
        page.locator("#pairs").get_by_text("1", exact=True).click()
        time.sleep(SETTLED_S)
        page.locator("#compare").click()
        expect(page.locator("#history tbody tr")).to_have_count(1, timeout=RUN_MS)
        expect(page.locator("#compare")).to_be_enabled()
        expect(page.locator("#result .sl-verdict")).to_contain_text("Identical")
        (entry,) = json.loads(_saved(page, "history-json"))
        return _of_entry(entry, _saved(page, "share-times"))
    finally:
        page.close()


def _saved(page: Page, button: str) -> str:
    """What a button downloads."""
    with page.expect_download() as found:
        page.locator(f"#{button}").click()
    return found.value.path().read_text(encoding="utf-8")


def _of_entry(entry: dict[str, Any], times: str) -> Answer:
    """An answer from the page's history; `times` has a line for each token of each arm."""
    arms = {kind: entry[kind] for kind in KINDS}
    tokens = {kind: sum(line.startswith(f"{kind},") for line in times.splitlines()) for kind in KINDS}
    return Answer(
        {kind: arm["ttft_s"] for kind, arm in arms.items()},
        {kind: arm["tpot_s"] for kind, arm in arms.items()},
        tuple(("".join(arm["answer"]).strip(), tokens[kind]) for kind, arm in arms.items()),
    )


def _of_json(found: dict[str, Any]) -> Answer:
    """An answer from the object of `compare --json` of one pair."""
    return _of_arms(found, {kind: found["every_run"][kind][0] for kind in KINDS})


def _of_command() -> list[Answer]:
    command = [sys.executable, "-m", "splitlearn", "compare", "--json", "--pairs", f"{RUNS}"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    return [_of_arms(found, {kind: found["every_run"][kind][run] for kind in KINDS}) for run in range(RUNS)]


def _of_arms(found: dict[str, Any], times: dict[str, dict[str, float]]) -> Answer:
    assert found["identical_tokens"], "full and split differ"
    arms = (found["full"], found["split_run"])
    return Answer(
        {kind: each["ttft_s"] for kind, each in times.items()},
        {kind: each["tpot_s"] for kind, each in times.items()},
        tuple((arm["text"].strip(), arm["n_tokens"]) for arm in arms),
    )


def _median(answers: list[Answer], kind: str) -> Generated:
    return Generated((), median(a.ttft_s[kind] for a in answers), median(a.tpot_s[kind] for a in answers))


def _row(found: dict[str, list[Generated]], name: str, baseline: str, kind: str) -> dict[str, str]:
    one, other = f"{name} {kind}", f"{baseline} {kind}"
    return {
        "arm": kind,
        "ratio": f"{name} / {baseline}",
        "TPOT, ms": both(found, one, other, "tpot_s"),
        "TPOT": ratio(found, one, other, "tpot_s"),
        "TTFT, ms": both(found, one, other, "ttft_s"),
        "TTFT": ratio(found, one, other, "ttft_s"),
    }
