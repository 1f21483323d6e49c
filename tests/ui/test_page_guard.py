"""What the page refuses before Gradio sees it, and what every answer of it says to the browser."""

import asyncio
import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from tests.support.trunk import eventually
from ui.guard.brake import Brake
from ui.guard.hosts import Hosts
from ui.guard.security import MOST_BYTES, MOST_EVENTS, guarded
from ui.janitor import sweep
from ui.login import Sharing

API = "/gradio_api"
LOGIN = ("ada", "cobalt-Harbor-42")
ELSEWHERE = "http://elsewhere.example"


@dataclass(frozen=True)
class Served:
    """A page of Gradio's behind the guard: its blocks, a client of it, and where its public link stands."""

    blocks: Any
    client: httpx.Client
    sharing: Sharing

    def join(self, **changes: object) -> httpx.Response:
        """Call the function that echoes, as a page does."""
        call = {"data": ["x"], "fn_index": next(iter(self.blocks.fns)), "session_hash": "abc", **changes}
        return self.client.post(f"{API}/queue/join", json=call)


def serve(login: tuple[str, str] | None = None, host: str = "127.0.0.1") -> Iterator[Served]:
    """A page with one text field, on a free port of loopback, as if it listened on `host`."""
    sharing = Sharing.of(True)
    with gr.Blocks(analytics_enabled=False) as blocks:
        box = gr.Textbox()
        box.submit(lambda text: text, box, box)
    blocks.queue(api_open=False)
    lifespan = guarded(Hosts(host, ["page.example"], sharing))
    quiet = {"quiet": True, "prevent_thread_lock": True, "ssr_mode": False, "run_history": False}
    blocks.launch(auth=login, server_name="127.0.0.1", app_kwargs={"lifespan": lifespan}, **quiet)
    with httpx.Client(base_url=blocks.local_url.rstrip("/"), trust_env=False) as client:
        yield Served(blocks, client, sharing)
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def page() -> Iterator[Served]:
    yield from serve()


@pytest.fixture(scope="module")
def shown_everywhere() -> Iterator[Served]:
    yield from serve(host="0.0.0.0")


@pytest.fixture
def locked() -> Iterator[Served]:
    yield from serve(LOGIN)


def test_without_ui_api_the_openai_protocol_is_not_there(page: Served) -> None:
    assert {page.client.get(path).status_code for path in ("/v1", "/v1/models")} == {404}


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LOCALHOST.:7860", "[::1]:9", "page.example"])
def test_the_page_is_there_under_its_names(page: Served, host: str) -> None:
    assert page.client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "elsewhere.example",
        "localhost.elsewhere.example",
        "127.0.0.1.elsewhere.example",
        "127.0.0.1@elsewhere.example",
        "page.example.elsewhere.example",
        "192.0.2.7",
        "",
    ],
)
def test_under_any_other_name_there_is_no_page(page: Served, host: str) -> None:
    for headers in ({"Host": host}, {"X-Forwarded-Host": f"localhost, {host or 'x'}"}):
        answer = page.client.get("/config", headers=headers)
        assert (answer.status_code, answer.text[:5]) == (400, "Host:")


def test_a_name_that_somebody_else_points_here_is_not_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts("127.0.0.1", (), Sharing.of(False))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", 0))])
    assert not hosts.has("rebound.example:7860")
    assert all(map(hosts.has, ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "[::ffff:127.0.0.1]")))


def test_a_page_on_all_addresses_has_them_all_and_no_other_name(shown_everywhere: Served) -> None:
    found = {host: shown_everywhere.client.get("/", headers={"Host": host}).status_code for host in (
        "192.0.2.7:7860", "0.0.0.0:7860", "[2001:db8::1]", "elsewhere.example"
    )}  # fmt: skip
    assert list(found.values()) == [200, 200, 200, 400]


def test_the_public_link_is_a_name_once_it_is_open(page: Served) -> None:
    link = {"Host": "stand-in.example"}
    assert page.client.get("/", headers=link).status_code == 400
    page.sharing.host = "stand-in.example"
    assert page.client.get("/", headers=link).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": ELSEWHERE},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://page.example.elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": ELSEWHERE, "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_another_site_can_neither_act_nor_read_here(page: Served, headers: dict[str, str]) -> None:
    for method, path in (("POST", "queue/join"), ("GET", "queue/data?session_hash=abc"), ("GET", "heartbeat/abc")):
        assert page.client.request(method, f"{API}/{path}", headers=headers).status_code == 403
    assert page.client.get("/config", headers=headers).status_code == 403
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in page.client.options(f"{API}/queue/join", headers=preflight).headers


def test_the_page_itself_a_proxy_of_it_and_a_program_can_act(page: Served) -> None:
    own = str(page.client.base_url).rstrip("/")
    for origin in (own, "https://page.example", None):
        headers = {"Origin": origin} if origin else {}
        call = {"data": ["x"], "fn_index": next(iter(page.blocks.fns)), "session_hash": "acts"}
        assert page.client.post(f"{API}/queue/join", headers=headers, json=call).status_code == 200


def test_a_link_from_elsewhere_opens_the_page_and_does_nothing_else(page: Served) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert page.client.get("/", headers=link).status_code == 200
    assert page.client.get("/logout", headers=link).status_code == 403
    assert page.client.get("/", headers={**link, "Sec-Fetch-Dest": "iframe"}).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/upload"),
        ("POST", f"{API}/component_server"),
        ("POST", f"{API}/stream/abc"),
        ("POST", f"{API}/call/echo"),
        ("GET", f"{API}/deep_link?session_hash=abc"),
        ("GET", f"{API}/file=http://127.0.0.1:1/x"),
        ("GET", f"{API}/file=%68ttps://elsewhere.example/x"),
        ("GET", f"{API}/proxy=https://elsewhere.hf.space/x"),
        ("GET", f"{API}/heartbeat/..%2F..%2Fx"),
        ("GET", "/monitoring"),
        ("PUT", "/"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(page: Served, method: str, path: str) -> None:
    answer = page.client.request(method, path, files={"files": b"x" * 1000} if path.endswith("upload") else None)
    assert answer.status_code == (405 if method == "PUT" else 404)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        *(({"session_hash": hash}, 400) for hash in ("/tmp/x", "../../x", "", "x" * 65, "a\0b", 5, ["x"], {"a": 1})),
        *(({"data": data}, 400) for data in ([], ["x", "y"], [{"path": "/etc/passwd"}], [[["x"]]], [[{"a": 1}]], "x")),
        ({"data": [{"path": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}]}, 400),
        *(({"fn_index": index}, 404) for index in (999, -1, "0", True, [0], 0.5)),
    ],
)
def test_a_call_with_what_no_page_sends_is_refused(page: Served, changes: dict[str, object], status: int) -> None:
    answer = page.join(**changes)
    assert answer.status_code == status
    assert "expected" in answer.text or "fn_index" in answer.text


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"null", b"\xff", b'{"data": "x"}'])
def test_a_body_that_is_no_call_is_refused(page: Served, body: bytes) -> None:
    assert page.client.post(f"{API}/queue/join", content=body).status_code == 400


def test_a_body_is_read_up_to_its_limit_whether_its_length_is_said_or_not(page: Served) -> None:
    long, pieces = b" " * (MOST_BYTES + 1), (b" " * 65536 for _ in range(MOST_BYTES // 65536 + 1))
    for content in (long, pieces):
        assert page.client.post("/login", content=content).status_code == 413


def test_calls_cannot_go_past_the_queue(page: Served) -> None:
    name = page.blocks.fns[next(iter(page.blocks.fns))].api_name
    call = {"data": ["x"], "session_hash": "abc"}
    assert page.client.post(f"{API}/run/{name}", json=call).status_code == 404


def test_who_reads_no_answers_gets_only_so_many_and_they_are_dropped(page: Served) -> None:
    codes = [page.join(session_hash="deaf").status_code for _ in range(MOST_EVENTS + 1)]
    assert codes == [200] * MOST_EVENTS + [429]
    app, queue = page.blocks.server_app, page.blocks._queue
    once = asyncio.run(sweep(app, ["hears"], {}))
    assert "deaf" in once
    assert "deaf" in queue.pending_messages_per_session
    asyncio.run(sweep(app, ["hears"], once))
    for kept in (queue.pending_messages_per_session, queue.pending_event_ids_session):
        assert "deaf" not in kept


def test_two_streams_of_one_session_that_break_off_are_no_error(page: Served, caplog: pytest.LogCaptureFixture) -> None:
    assert page.join(session_hash="twice").status_code == 200
    guard = page.blocks.app.middleware_stack
    # The first stream gets the one answer and ends.
    with ExitStack() as streams:
        for _ in range(3):
            streams.enter_context(page.client.stream("GET", f"{API}/queue/data", params={"session_hash": "twice"}))
        assert eventually(lambda: guard.reading["twice"] == 2)
    assert eventually(lambda: "twice" not in guard.reading)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_stream_of_a_session_that_is_gone_says_so_and_is_no_error(
    page: Served, caplog: pytest.LogCaptureFixture
) -> None:
    said = page.client.get(f"{API}/queue/data", params={"session_hash": "gone"}).text
    assert '"session_not_found":true' in said.replace(" ", "")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_what_a_page_has_just_asked_for_is_not_dropped_though_it_read_nothing_for_long(page: Served) -> None:
    app, queue = page.blocks.server_app, page.blocks._queue
    page.join(session_hash="idle")
    once = asyncio.run(sweep(app, [], {}))
    page.join(session_hash="idle")  # and before its page opens the stream of answers
    twice = asyncio.run(sweep(app, [], once))
    assert len(queue.pending_event_ids_session["idle"]) == 2 and "idle" in queue.pending_messages_per_session
    asyncio.run(sweep(app, [], twice))
    assert "idle" not in queue.pending_messages_per_session


def test_every_answer_says_what_a_browser_may_do(page: Served) -> None:
    answers = [page.client.get(path) for path in ("/", "/config", "/theme.css", f"{API}/nothing", "/assets/nothing")]
    answers += [page.client.head("/"), page.client.get("/", headers={"Host": "elsewhere.example"})]
    for answer in answers:
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert "'unsafe-inline'" not in re.search(r"script-src [^;]*", policy)[0]  # type: ignore[index]


def test_the_pages_own_scripts_have_a_nonce_of_this_answer_alone(page: Served) -> None:
    nonces = set()
    for _ in range(2):
        answer = page.client.get("/")
        (nonce,) = re.findall("'nonce-([^']+)'", answer.headers["content-security-policy"])
        scripts = re.findall(r"<script[^>]*>", answer.text)
        assert scripts
        assert all(f'nonce="{nonce}"' in script for script in scripts)
        nonces.add(nonce)
    assert len(nonces) == 2


def test_before_a_login_nothing_is_answered_but_the_way_to_it(locked: Served) -> None:
    assert locked.client.get("/").status_code == 200
    hidden = ("/config", f"{API}/info", f"{API}/heartbeat/abc", f"{API}/queue/data?session_hash=abc", f"{API}/token")
    assert {locked.client.get(path).status_code for path in hidden} == {401}
    assert locked.client.post(f"{API}/cancel", json={}).status_code == 401


def test_wrong_logins_are_braked_and_the_right_one_gets_in_once_it_waited(locked: Served) -> None:
    user, password = LOGIN

    def status(tried: str, address: str = "192.0.2.1") -> httpx.Response:
        # Gradio's server believes what a proxy on this machine says.
        headers = {"X-Forwarded-For": address}
        return locked.client.post("/login", data={"username": user, "password": tried}, headers=headers)

    assert [status(f"wrong {at}").status_code for at in range(5)] == [400] * 5
    braked = next(answer for answer in (status("wrong") for _ in range(500)) if answer.status_code == 429)
    assert 1 <= int(braked.headers["retry-after"]) <= 5
    right = status(password, address="192.0.2.2")  # another address has tries of its own
    assert right.status_code == 200
    cookies = right.headers.get_list("set-cookie")
    assert len(cookies) == 2
    assert all("HttpOnly" in cookie and "SameSite=Lax" in cookie for cookie in cookies)
    assert locked.client.get("/config").status_code in (200, 401)  # the Secure one is not sent over plain HTTP
    made_up = (status("wrong", f"198.51.{at // 250}.{at % 250}").status_code for at in range(2000))
    assert 429 in made_up


def test_the_brake_lets_one_try_in_after_the_time_that_it_says() -> None:
    now = 0.0
    brake = Brake(lambda: now)
    for _ in range(5):
        assert brake.take("a") == 0
    wait_s = brake.take("a")
    assert wait_s == 5
    assert brake.take("b") == 0
    now += wait_s
    assert brake.take("a") == 0
    assert brake.take("a") > 0


def test_right_logins_do_not_use_the_brake_up() -> None:
    brake = Brake(lambda: 0.0)
    for _ in range(100):
        assert brake.take("a") == 0
        brake.give_back("a")


def test_made_up_addresses_are_braked_together() -> None:
    brake = Brake(lambda: 0.0)
    granted = sum(brake.take(f"{at}") == 0 for at in itertools.islice(itertools.count(), 2000))
    assert granted == 30


def test_names_of_files_that_are_gone_are_forgotten(page: Served, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.touch()
    files = page.blocks.temp_file_sets[0]
    files |= {str(here), str(tmp_path / "gone")}
    asyncio.run(sweep(page.blocks.server_app, [], {}))
    assert str(here) in files
    assert str(tmp_path / "gone") not in files
