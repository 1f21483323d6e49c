"""Several users of one page, each in her own browser with her own prompt, press Compare again and again.

Each answer must be the one that the prompt has when nobody else is there. Each place in the queue that a page shows
must be the number of runs that still come before its own. No page may report an error, and memory must stay flat.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bench.report import table, write
from bench.waiting import Run, check, place_of
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from tests.support.page import CHROMIUM, PATIENCE_MS, App, running, write_config

WORDS = ("anchor", "butter", "castle", "dragon", "engine", "forest", "guitar", "harbor")
PROMPT = "Write one sentence about the secret word {}."
TOKENS = 32
POLL_S, SAMPLE_S, THINKS_S = 0.2, 1.0, 2.0
LONGEST_S = 300.0
BAD_STATUS = 400
MOST_LISTED = 3
# Reads all that a page shows in one call.
LOOK = """() => Object.fromEntries(Object.entries({status: '#status', error: '#error .sl-error',
  verdict: '#result .sl-verdict', full: '#full .sl-answer', split: '#split .sl-answer'}).map(([name, where]) =>
  [name, document.querySelector(where)?.textContent.trim() ?? '']))"""
READY = "() => !document.querySelector('#compare').disabled"


@dataclass
class User:
    """A user: her page, the expected texts of her answers, and what her page showed."""

    page: Page
    expected: tuple[str, str]
    runs: list[Run] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    next_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether a comparison of hers waits or runs."""
        return bool(self.runs) and self.runs[-1].ended_s is None

    def press(self) -> None:
        """Press Compare if the button is enabled."""
        now = time.monotonic()
        if self.page.evaluate(READY):
            self.runs.append(Run(now))
            self.page.locator("#compare").click()
        elif now - self.next_s > LONGEST_S:
            self.errors.append(f"Compare cannot be pressed {LONGEST_S:g} s after an answer")
            self.next_s = now

    def look(self) -> None:
        """Record what her page shows of her current run."""
        run, seen, now = self.runs[-1], self.page.evaluate(LOOK), time.monotonic()
        status, place = seen["status"], place_of(seen["status"])
        if place:
            run.places.append((now, place))
        elif run.started_s is None and status.startswith(("Full", "Split")):
            run.started_s = now
        elif run.started_s is not None and status == "Done.":
            self._end(run, seen, now)
        if seen["error"] or (now - run.pressed_s > LONGEST_S and self.waits):
            self.errors.append(seen["error"] or f"no answer within {LONGEST_S:g} s: {status!r}")
            run.ended_s = now

    def _end(self, run: Run, seen: Mapping[str, str], now: float) -> None:
        run.ended_s, self.next_s = now, now + random.uniform(0, THINKS_S)
        if (seen["full"], seen["split"]) != self.expected or not seen["verdict"].startswith("Identical"):
            self.wrong.append(f"{self.expected} expected, {dict(seen)} seen")


@dataclass(frozen=True)
class Memory:
    """Resident bytes at one moment: of the page's process, and of its workers and trunks."""

    at_s: float
    page: int
    workers: int


def main(runs: Runs, users: int = 8, minutes: float = 5.0) -> None:
    """Measure and write docs/results/users.md."""
    with TemporaryDirectory() as folder:
        sections = {"flags": runs.config.flags, "runs": runs.config.runs.model_dump()}
        config = write_config(Path(folder), **sections, generation={"max_new_tokens": TOKENS})
        with running(config, fresh=True) as app, _chromium() as browser:
            url = app.warm_url()
            everybody = [_user(browser, url, *asked) for asked in _alone(url, users).items()]
            memory = _together(everybody, app, minutes)
    text = (
        f"{users} browser contexts for {minutes:g} minutes, each with a prompt of its own; flags "
        f"`{runs.config.flags}`; {TOKENS} tokens, three runs of each arm. Each presses Compare, waits for the answer, "
        f"and presses again within {THINKS_S:g} s. A program reads the pages every {POLL_S:g} s or less often; a "
        "page asks for its place every second.\n\n"
        f"Resident memory, from when each of them had an answer:\n\n{table(_memory(memory))}\n\nWhat they saw:"
    )
    write("users", "Several users at one page", text, _rows(everybody), environment(runs))


def _alone(url: str, users: int) -> dict[str, tuple[str, str]]:
    """A prompt for each user, with both arms' answers while nobody else uses the page."""
    client, found = Client(url, verbose=False), dict[str, tuple[str, str]]()
    for number in range(users):
        prompt = PROMPT.format(WORDS[number % len(WORDS)] * (1 + number // len(WORDS)))
        answer = client.predict(prompt=prompt, api_name="/compare")
        assert answer["identical_tokens"], f"full and split differ for {prompt!r}"
        found[prompt] = (answer["full"]["text"].strip(), answer["split_run"]["text"].strip())
    assert len(set(found.values())) == users, "two prompts have the same answer: a mix-up could not be seen"
    return found


def _user(browser: Browser, url: str, prompt: str, expected: tuple[str, str]) -> User:
    page = browser.new_context().new_page()
    user = User(page, expected)
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: user.errors.append(str(error)))
    page.on("console", lambda said: user.errors.append(said.text) if said.type == "error" else None)
    page.on("response", lambda each: user.errors.append(f"{each.status} {each.url}") if _bad(each.status) else None)
    page.goto(url)
    expect(page.locator("#compare")).to_be_enabled()
    page.locator("#prompt textarea").fill(prompt)
    return user


def _bad(status: int) -> bool:
    return status >= BAD_STATUS


def _together(everybody: Sequence[User], app: App, minutes: float) -> list[Memory]:
    """All users press Compare for `minutes` and wait for their last answers. Returns memory since all had an answer."""
    memory, began = list[Memory](), time.monotonic()
    end, printed = began + 60 * minutes, 0
    while (now := time.monotonic()) < end or any(user.waits for user in everybody):
        for user in everybody:
            if user.waits:
                user.look()
            elif user.next_s <= now < end:
                user.press()
        served = all(user.runs and user.runs[0].ended_s for user in everybody)
        if served and (not memory or now - memory[-1].at_s >= SAMPLE_S):
            memory.append(_held(app, now))
        if now - began > 60 * printed:
            print(f"{printed} of {minutes:g} minutes, {sum(len(user.runs) for user in everybody)} presses", flush=True)
            printed += 1
        everybody[0].page.wait_for_timeout(1e3 * POLL_S)
    return [*memory, _held(app, time.monotonic())]


def _held(app: App, now: float) -> Memory:
    page = psutil.Process(app.process.pid).memory_info().rss
    return Memory(now, page, sum(child.memory_info().rss for child in app.children()))


@contextmanager
def _chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def _rows(everybody: Sequence[User]) -> list[dict[str, Any]]:
    found = []
    for user in everybody:
        others = [run for other in everybody if other is not user for run in other.runs]
        found += [check(run, others) for run in user.runs]
    done = [run for user in everybody for run in user.runs if run.started_s and run.ended_s]
    assert done, [said for user in everybody for said in user.errors]
    waits = [run.started_s - run.pressed_s for run in done if run.started_s]
    figures = {
        "comparisons that ended, each user": ", ".join(str(len(user.runs)) for user in everybody),
        "errors: on a page, in its console, in an answer of the server": _listed(
            [e for u in everybody for e in u.errors]
        ),
        "answers that are not the prompt's own": _listed([wrong for user in everybody for wrong in user.wrong]),
        "places in line that were read": sum(each.shown for each in found),
        "of them right at that moment": sum(each.exact for each in found),
        "of them wrong for longer than two seconds": _listed([wrong for each in found for wrong in each.wrong]),
        "waits in which a place went up": sum(each.went_up for each in found),
        "wait from the press to the first run, s: mean, longest": f"{fmean(waits):.1f}, {max(waits):.1f}",
    }
    return [{"what": what, "found": figure} for what, figure in figures.items()]


def _listed(said: Sequence[str]) -> str:
    """How many, and the first of them in one line."""
    return "; ".join([str(len(said)), *(" ".join(each.split()).replace("|", "/") for each in said[:MOST_LISTED])])


def _memory(samples: Sequence[Memory]) -> list[dict[str, Any]]:
    columns: dict[str, Callable[[Memory], int]] = {"page": lambda s: s.page, "workers and trunk": lambda s: s.workers}
    rows = []
    for name, size in columns.items():
        values = np.array([size(sample) / 1e6 for sample in samples])
        ends = max(1, len(values) // 5)
        times = np.array([(sample.at_s - samples[0].at_s) / 60 for sample in samples])
        rows.append(
            {
                "process": name,
                "samples": len(values),
                "first fifth, mean, MB": f"{values[:ends].mean():.1f}",
                "last fifth, mean, MB": f"{values[-ends:].mean():.1f}",
                "most, MB": f"{values.max():.1f}",
                "slope, MB/minute": f"{np.polyfit(times, values, 1)[0]:+.2f}",
            }
        )
    return rows
