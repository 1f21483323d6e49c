"""A page for tests: the real app in a process of its own, and a browser that drives it.

An app with its trunk and arms takes five seconds of computing to start. Its page takes two seconds to load, and one
each further time. So the tests of one file share both, by the fixtures of tests/ui/conftest.py:

- `browser`: one Chromium for the file. `open_page(browser, url)` opens the page for a fresh visitor.
- `running(config)`: an app, in a fixture of module scope unless tests change its configuration.
- a page in a fixture of module scope, for tests that leave it as they found it.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect, sync_playwright

from tests.support import ROOT, without_torch
from tests.support.forks import Fork
from tests.support.trunk import listens

WITHOUT_TORCH = Path(without_torch.__file__)
# The shell has the engine without a browser's window around it: a page's first load takes half the computing.
BROWSERS = (Path("/usr/bin/chromium-headless-shell"), Path("/usr/bin/chromium"))
CHROMIUM = next((browser for browser in BROWSERS if browser.exists()), BROWSERS[0])
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-software-rasterizer"]
START_S = 240.0
# A child that is importing torch notices the end of its parent only after that.
END_S = 240.0
# The default timeout on a page: the machine may be busy with other tests.
PATIENCE_MS = 60_000
# How long typed text must stay: Gradio sets up a part that was just folded out again, a moment after it is visible.
SETTLED_MS, TIMES = 300, 10
FORBIDDEN: list[str] = []
# Opens all that can be folded out and is visible, and then what was in it.
UNFOLD = """async () => {
  const all = () => [...document.querySelectorAll('button.label-wrap:not(.open)')];
  const folded = () => all().filter(button => button.checkVisibility());
  for (let found; (found = folded()).length;) {
    found.forEach(button => button.click());
    while (found.some(button => !button.classList.contains('open'))) await new Promise(requestAnimationFrame);
  }
  document.querySelectorAll('details').forEach(part => part.open = true);
}"""
WARM = re.compile("Both arms are warm")
LOCAL = re.compile(r"The page is on (http://\S+)")


class App:
    """`python app.py` with a configuration, run in `folder` without torch. `lines` is its output.

    It is forked from a process that has its imports. `fresh` starts an interpreter as a person does, which takes ten
    seconds more. Tests of the start need that, and those of libraries that read `environment` at import.
    """

    def __init__(
        self,
        config: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        fresh: bool = False,
    ) -> None:
        self.lines: list[str] = []
        self._more, self._over = threading.Condition(), False
        arguments, own = ["--config", str(config), *options], {"SPLITLEARN_AUTH": "", **(environment or {})}
        self.process: Fork | subprocess.Popen[str]
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, str(WITHOUT_TORCH), *arguments],
                cwd=folder,
                env={**os.environ, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        else:
            self.process = Fork(without_torch.forked, arguments, folder, None, own)
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, pattern: "re.Pattern[str]", timeout_s: float = START_S) -> "re.Match[str]":
        """The first match in a printed line. Waits at most `timeout_s` for each line, then raises with all output."""
        at = 0
        while (line := self._line(at, timeout_s)) is not None:
            if found := pattern.search(line):
                return found
            at += 1
        raise RuntimeError(f"no {pattern.pattern!r} in:\n" + "".join(self.lines))

    def url(self) -> str:
        """Wait until the page is up, and return its URL."""
        return self.wait_for(LOCAL)[1]

    def warm_url(self) -> str:
        """Wait until both arms are loaded, too, and return the page's URL."""
        url = self.url()
        self.wait_for(WARM, 4 * START_S)
        return url

    def children(self) -> list[psutil.Process]:
        """All running processes that the app has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def trunks(self) -> list[psutil.Process]:
        """The embedded trunk servers: one for each requested set of load and process flags."""
        return [child for child in self.children() if listens(child)]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the app, wait for its end, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(END_S)

    def _line(self, at: int, timeout_s: float) -> str | None:
        with self._more:
            self._more.wait_for(lambda: self._over or at < len(self.lines), timeout_s)
            return self.lines[at] if at < len(self.lines) else None

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()


def write_config(folder: Path, **sections: object) -> Path:
    """Write a config.yaml to `folder` for one thread and a free port, updated by `sections`. Comparisons do not go into
    a history on this machine."""
    path = folder / "config.yaml"
    ui = {"port": 0, "history_file": False, **sections.pop("ui", {})}  # type: ignore[dict-item]  # plain YAML
    usual = {"flags": "default", "runs": {"threads": 1}, "ui": ui}  # flags without kernels to compile
    path.write_text(yaml.safe_dump({**usual, **sections}))
    return path


def launch_fails(config: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Start an app that cannot start, and return its error: one line on stderr, nothing on stdout, exit status 2."""
    ended = subprocess.run(
        [sys.executable, "app.py", "--config", str(config), *options],
        cwd=ROOT,
        env={**os.environ, "SPLITLEARN_AUTH": "", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    return ended.stderr


@contextmanager
def running(
    config: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    fresh: bool = False,
) -> Iterator[App]:
    """An app for a `with` block. On SIGTERM it must end in order, together with all its children."""
    app = App(config, *options, environment=environment, folder=folder, fresh=fresh)
    try:
        yield app
        children = app.children()
        assert app.end() == 0
        assert not psutil.wait_procs(children, timeout=END_S)[1]
        assert not any("Traceback" in line for line in app.lines), "".join(app.lines)
    finally:
        app.end()


@contextmanager
def measuring(folder: Path, model: Path, **sections: object) -> Iterator[App]:
    """An app in `folder` for tests that measure. It keeps its experiments there, and has its own cache, so that it is
    independent of other experiments on this machine."""
    usual = {"model": {"name": str(model)}, "generation": {"max_new_tokens": 4}}
    config = write_config(folder, **{**usual, **sections})
    environment = {"PYTHONPATH": str(ROOT), "SPLITLEARN_CACHE": str(folder / "cache")}
    with running(config, environment=environment, folder=folder) as started:
        yield started


@contextmanager
def chromium() -> Iterator[BrowserContext]:
    """A headless Chromium. `open_page` opens the app's page in it.

    It has its own profile on disk for the page's compiled scripts: without them a page computes twice as long. It does
    not emulate a graphics card, and prefers reduced motion: both would take a fifth of a comparison's computing.
    """
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            "", executable_path=CHROMIUM, args=ARGUMENTS, reduced_motion="reduce"
        )
        try:
            yield browser
        finally:
            browser.close()


def open_page(
    browser: BrowserContext,
    url: str,
    width: int = 1280,
    height: int = 800,
    theme: str = "light",
    new_browser: bool = False,
) -> Page:
    """Open the page for a fresh visitor, and wait until it is usable. Violations of its content security policy go into
    `FORBIDDEN`. What the page keeps in the browser stays there, unless it is to be as in a `new_browser`."""
    browser.clear_cookies()
    page = browser.new_page()
    if new_browser:
        storage = {"origin": url, "storageTypes": "local_storage"}
        browser.new_cdp_session(page).send("Storage.clearDataForOrigin", storage)
    page.set_viewport_size({"width": width, "height": height})
    page.on("console", lambda line: FORBIDDEN.append(line.text) if "Content Security Policy" in line.text else None)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{url}?__theme={theme}")
    expect(page.locator("#compare")).to_be_enabled()
    return page


def type_into(box: Locator, value: str) -> None:
    """Fill a field that may just have been folded out, which can lose text that a person would type later."""
    for _ in range(TIMES):
        box.fill(value)
        box.page.wait_for_timeout(SETTLED_MS)
        if box.input_value() == value:
            return
    raise AssertionError(f"the field does not keep {value!r}")


def setting(page: Page, name: str, value: str) -> None:
    """Fill the field `name`."""
    type_into(page.locator(f"#{name}").locator("input, textarea").first, value)


def unfold(page: Page) -> None:
    """Open every part of the tab that is shown."""
    page.evaluate(UNFOLD)


@contextmanager
def unanswered(page: Page, asked: str = "**/run/*") -> Iterator[None]:
    """A `with` block in which the page gets no answer to requests of the URL `asked`: as given, those outside the
    queue."""
    late: list[Route] = []
    page.route(asked, lambda request: late.append(request))
    yield
    assert late
    page.unroute(asked)  # which lets those go that wait


def conversation(page: Page, *said: str) -> None:
    """Send these messages on the Chat tab, and show the token ids of the last one's prompt. In any language."""
    for number, text in enumerate(said or ("Hello", "Go on"), 1):
        setting(page, "chat-message", text)
        page.locator("#chat-send").click()
        expect(page.locator(".sl-turn .sl-verdict:is(.sl-same, .sl-differ)")).to_have_count(
            number, timeout=START_S * 1000
        )
        expect(page.locator("#chat-send")).to_be_enabled()
    page.locator(".sl-turn button[data-do=select]").last.click()
    expect(page.locator("#chat-prompt li").first).to_be_visible()


def experiment(page: Page, flag: str = "inference_mode", pairs: int = 2) -> None:
    """Measure one flag on the Lab tab, and stay there until the report is drawn. In any language."""
    page.get_by_role("tab").nth(3).click()
    setting(page, "lab-flags", flag)
    unfold(page)
    page.locator("input[type=radio][value=pairs]").check()
    setting(page, "lab-pairs", str(pairs))
    page.locator("#lab-start").click()
    expect(page.locator("#lab-details details").first).to_be_visible(timeout=START_S * 1000)
    expect(page.locator("#lab-start")).to_be_enabled()


def attacks(page: Page) -> None:
    """Read a prompt on the tab What the server reads, then sweep one cut with one prompt. In any language."""
    page.get_by_role("tab").nth(4).click()
    page.locator("#attacks-read").click()
    expect(page.locator("#attacks-readings section")).to_have_count(3, timeout=START_S * 1000)
    expect(page.locator("#attacks-read")).to_be_enabled(timeout=START_S * 1000)
    setting(page, "sweep-cuts", "1")
    setting(page, "sweep-limit", "1")
    page.locator("#sweep-start").click()
    expect(page.locator("#sweep-curve .js-plotly-plot")).to_be_visible(timeout=2 * START_S * 1000)
    expect(page.locator("#sweep-start")).to_be_enabled(timeout=START_S * 1000)


def open_experiment(page: Page, at: int = 0) -> None:
    """Choose an experiment on the Lab tab from the list, newest first, and wait until all of its report is drawn."""
    page.locator("#lab-chosen input").click()
    page.get_by_role("option").nth(at).click()
    expect(page.locator("#lab-details details").first).to_be_visible()
    expect(page.locator("#lab-ledger-split .js-plotly-plot")).to_be_visible()
    expect(page.get_by_role("tabpanel").filter(visible=True).locator(".empty")).to_have_count(0)
