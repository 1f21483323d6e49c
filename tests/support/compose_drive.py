"""Drives the compose stack for test_compose.py, on the machine where its published ports are on 127.0.0.1.

`python -m tests.support.compose_drive OUT` writes its observations to OUT, as one JSON object. The environment variable
COMPOSE is the compose command line.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import BrowserContext

from tests.support.page import chromium, open_page

ROOT = Path(__file__).parents[2]
PAGE = "http://127.0.0.1:7860/"
COMPOSE = shlex.split(os.environ["COMPOSE"])
COMPARE = "python -m splitlearn compare --trunk trunk:50051 --max-new-tokens 16 --ignore-eos --json"


def compose(*words: str) -> str:
    """The stdout of a compose command. Raises CalledProcessError if it fails."""
    return subprocess.run([*COMPOSE, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def page_answers(within_s: float) -> int:
    """Request the page until it answers, and return its HTTP status. Raises the last error if it does not in time."""
    end = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(PAGE, timeout=5) as answer:
                return int(answer.status)
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def press(browser: BrowserContext) -> str:
    """Press Compare on a fresh page, and return its verdict or its error."""
    page = open_page(browser, PAGE)
    page.locator("#compare").click()
    outcome = page.locator("#result .sl-verdict, #error [role=alert]").first
    outcome.wait_for(timeout=240_000)
    return outcome.inner_text()


def cut(browser: BrowserContext) -> str:
    """Kill the trunk in the middle of the page's split answer, start it again, and return the page's texts."""
    page = open_page(browser, PAGE)
    page.locator("#settings > button").click()
    page.locator("#max_new_tokens").locator("input, textarea").first.fill("256")
    page.get_by_label("Ignore the end token").check()
    page.locator("#compare").click()
    answer = page.locator("#split section[data-state=running] .sl-answer").filter(has_text=re.compile(r"\w"))
    answer.wait_for(timeout=240_000)
    compose("kill", "trunk")
    compose("start", "trunk")
    page.locator("#result .sl-verdict, #error [role=alert]").first.wait_for(timeout=240_000)
    return "\n".join(page.locator("#result, #error, #split section").all_inner_texts())


def on_the_page() -> dict[str, str]:
    """The page's texts while the trunk runs, after it was killed, and after it was started again."""
    with chromium() as browser:
        texts = {"first": press(browser), "cut": cut(browser)}
        compose("kill", "trunk")
        texts["killed"] = press(browser)
        compose("start", "trunk")
        health("trunk", within_s=60)
        texts["back"] = press(browser)
        return texts


def health(service: str, within_s: float) -> str:
    """Wait until the service is no longer starting, and return its health."""
    end = time.monotonic() + within_s
    while True:
        state = str(json.loads(compose("ps", "--format", "json", service))["Health"])
        if state != "starting" or time.monotonic() > end:
            return state
        time.sleep(1)


def open_port(port: int) -> bool:
    """Whether something listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main(out: Path) -> None:
    """Observe the stack from outside and from inside, and write the result to `out`."""
    seen: dict[str, object] = {"status": page_answers(within_s=120)}
    seen["health"] = {service: health(service, within_s=60) for service in ("trunk", "app")}
    seen["users"] = {service: compose("exec", "-T", service, "id", "-u").strip() for service in ("trunk", "app")}
    seen["trunk_published"] = open_port(50051)
    seen["comparison"] = json.loads(compose("exec", "-T", "app", *shlex.split(COMPARE)))
    seen["page"] = on_the_page()
    overlay = ["-f", str(ROOT / "compose.yaml"), "-f", str(ROOT / "compose.gpu.yaml")]
    seen["with_gpu"] = json.loads(compose(*overlay, "config", "--format", "json"))["services"]
    began = time.monotonic()
    compose("stop", "app", "trunk")
    seen["stop_s"] = time.monotonic() - began
    out.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
