"""A page for tests: the real app in a process of its own, and a browser that drives it.

What costs time is to start an app (five seconds of computing, with its trunk and arms) and to load its page (two
seconds for the first, one for each more). So tests of one file share both, by the fixtures of tests/ui/conftest.py:

- `browser`: one Chromium for the file. `open_page(browser, url)` opens the page for a fresh visitor.
- `running(config)`: an app, in a fixture of module scope wherever the tests leave its configuration as it is.
- A test that leaves the page as it found it shares that, too: a page in a fixture of module scope.
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
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright

from tests.support import ROOT, without_torch
from tests.support.forks import Fork
from tests.support.trunk import listens

WITHOUT_TORCH = Path(without_torch.__file__)
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-software-rasterizer"]
START_S = 90.0
# A child that still imports torch sees the end of its parent only afterwards.
END_S = 60.0
# How long a page may take for what has no bound of its own: the machine may be busy with other tests.
PATIENCE_MS = 30_000
# How long what was typed must stay: Gradio sets up what was just folded out once more, a moment after it can be seen.
SETTLED_MS, TIMES = 300, 10
FORBIDDEN: list[str] = []
WARM = re.compile("Both arms are warm")
LOCAL = re.compile(r"The page is on (http://\S+)")


class App:
    """`python app.py` with a configuration, run in `folder` without torch; what it prints, and how to end it.

    It is forked from a process that has its imports. `fresh` starts an interpreter, as a person does, and computes ten
    seconds more: for what is about the start, and for libraries that read `environment` when they are imported.
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
        """The first match in a line that was printed, or is before no line comes for `timeout_s`; raises with all that
        was printed otherwise."""
        at = 0
        while (line := self._line(at, timeout_s)) is not None:
            if found := pattern.search(line):
                return found
            at += 1
        raise RuntimeError(f"no {pattern.pattern!r} in:\n" + "".join(self.lines))

    def url(self) -> str:
        """Where the page is, once it is there."""
        return self.wait_for(LOCAL)[1]

    def warm_url(self) -> str:
        """Where the page is, once both arms are loaded, too."""
        url = self.url()
        self.wait_for(WARM, 4 * START_S)
        return url

    def children(self) -> list[psutil.Process]:
        """Every process that the app has started and that runs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def trunks(self) -> list[psutil.Process]:
        """The embedded trunk servers: one for each set of load and process flags that was asked for."""
        return [child for child in self.children() if listens(child)]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the app and wait until it has gone; its exit status."""
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
    """A config.yaml in `folder` for one thread and a free port, with `sections` over it. What is compared goes into no
    history on this machine."""
    path = folder / "config.yaml"
    ui = {"port": 0, "history_file": False, **sections.pop("ui", {})}  # type: ignore[dict-item]  # plain YAML
    usual = {"flags": "default", "runs": {"threads": 1}, "ui": ui}  # flags without kernels to compile
    path.write_text(yaml.safe_dump({**usual, **sections}))
    return path


def launch_fails(config: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """What an app says that cannot start: one line on stderr, nothing on stdout, exit status 2."""
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
    """An app for as long as the context is open. It must end in order when it is told to, and leave nobody behind."""
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
    """An app in `folder` for tests that measure: it keeps its experiments there, and has a cache of its own, so that an
    experiment of somebody else on this machine is none of its."""
    usual = {"model": {"name": str(model)}, "generation": {"max_new_tokens": 4}}
    config = write_config(folder, **{**usual, **sections})
    environment = {"PYTHONPATH": str(ROOT), "SPLITLEARN_CACHE": str(folder / "cache")}
    with running(config, environment=environment, folder=folder) as started:
        yield started


@contextmanager
def chromium() -> Iterator[BrowserContext]:
    """A Chromium without windows; `open_page` opens the app's page in it.

    It has a profile of its own on disk, for the page's compiled scripts: without them a page computes twice as long. It
    emulates no graphics card, and asks for little motion: both take a fifth of what a comparison computes here.
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


def open_page(browser: BrowserContext, url: str, width: int = 1280, height: int = 800, theme: str = "light") -> Page:
    """A fresh visitor's page, once it can be used. What its content security policy forbids goes into `FORBIDDEN`."""
    browser.clear_cookies()
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.on("console", lambda said: FORBIDDEN.append(said.text) if "Content Security Policy" in said.text else None)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{url}?__theme={theme}")
    expect(page.locator("#compare")).to_be_enabled()
    return page


def type_into(box: Locator, value: str) -> None:
    """Fill a field that may have been folded out just now; a person is never quick enough to lose it so."""
    for _ in range(TIMES):
        box.fill(value)
        box.page.wait_for_timeout(SETTLED_MS)
        if box.input_value() == value:
            return
    raise AssertionError(f"the field does not keep {value!r}")


def setting(page: Page, name: str, value: str) -> None:
    """Fill the field called `name`."""
    type_into(page.locator(f"#{name}").locator("input, textarea").first, value)
