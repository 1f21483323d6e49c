"""The Chat tab in a browser: a conversation with both arms."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitlearn.checkpoints.folder import ModelFiles
from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, App, open_page, running, setting, unanswered, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = 240_000
NEW_TOKENS = 6
# Counts the turns that have ended: Send can be pressed again.
COUNT = """() => {
  const send = document.getElementById('chat-send');
  window.ended = 0;
  new MutationObserver(() => { window.ended += !send.disabled; }).observe(send, {attributeFilter: ['disabled']});
}"""
SYSTEM = "Be brief."
HOSTILE = "<img src=x onerror='window.hacked=1'> **b** ${window.hacked=1} <|end|> \u202emirrored \N{ROCKET}"


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    name = str(tiny_model().folder)
    generation = {"max_new_tokens": NEW_TOKENS}
    with running(write_config(tmp_path_factory.mktemp("chat"), model={"name": name}, generation=generation)) as started:
        yield started


def chat(browser: BrowserContext, url: str) -> Page:
    opened = open_page(browser, url, new_browser=True)
    opened.get_by_role("tab", name="Chat").click()
    opened.evaluate(COUNT)
    return opened


@pytest.fixture
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    opened = chat(browser, url)
    yield opened
    opened.close()
    assert not FORBIDDEN


def message(page: Page) -> str:
    return page.locator("#chat-message textarea").input_value()


def turns(page: Page, *said: str) -> None:
    """The conversation has these turns."""
    expect(page.locator(".sl-turn .sl-said")).to_have_text(list(said))


def begin(page: Page, text: str) -> None:
    setting(page, "chat-message", text)
    page.locator("#chat-message textarea").press("Shift+Enter")


def press(page: Page, button: str, turn: int) -> None:
    page.get_by_role("button", name=f"{button}, turn {turn}").click()


@contextmanager
def run(page: Page) -> Iterator[None]:
    """Wait at the end of a `with` block for the end of the turn that begins in it."""
    before = page.evaluate("window.ended")
    yield
    page.wait_for_function(f"window.ended > {before}", timeout=RUN_MS)


def send(page: Page, text: str) -> None:
    with run(page):
        begin(page, text)


def ids(page: Page, turn: int) -> list[int]:
    """The token ids of a turn's prompt, which both arms were sent."""
    press(page, "Token ids", turn)
    expect(page.locator("#chat-prompt h2")).to_have_text(f"Prompt of turn {turn}")
    expect(page.locator("#chat-prompt h3")).to_contain_text("sent to both arms")
    return [int(text) for text in page.locator("#chat-prompt .sl-ids b").all_inner_texts()]


class Transformers:
    """What transformers itself makes of a conversation."""

    def __init__(self, files: ModelFiles) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(files.folder)
        self.model = AutoModelForCausalLM.from_pretrained(files.folder)

    def ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def answer(self, messages: Sequence[dict[str, str]]) -> str:
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        found = self.model.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(self.tokenizer.decode(found[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def test_two_turns_show_the_ids_that_transformers_makes_of_them_and_an_edit_drops_what_came_after(
    page: Page, tiny_model: TinyFactory
) -> None:
    theirs = Transformers(tiny_model())
    setting(page, "chat-system", SYSTEM)
    send(page, "Why is the sky blue?")
    turns(page, "Why is the sky blue?")
    assert message(page) == ""
    expect(page.locator("#chat-message textarea")).to_be_focused()
    expect(page.locator(".sl-turn .sl-verdict")).to_contain_text("Identical")
    for side in ("full", "split"):
        shown = page.locator(f".sl-turn .sl-{side}")
        expect(shown).to_have_attribute("data-state", "done")
        assert all(any(map(str.isdigit, value)) for value in shown.locator("dd").all_inner_texts())
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why is the sky blue?"}]
    assert ids(page, 1) == theirs.ids(asked)
    assert page.locator("#chat-prompt mark").all_inner_texts()[0] == "'<|user|>'"

    send(page, "And the sea?")
    turns(page, "Why is the sky blue?", "And the sea?")
    asked += [{"role": "assistant", "content": theirs.answer(asked)}, {"role": "user", "content": "And the sea?"}]
    assert ids(page, 2) == theirs.ids(asked)
    used = len(theirs.ids(asked)) + int(page.locator(".sl-turn .sl-full dd").last.inner_text())
    expect(page.locator("#chat-context")).to_contain_text(f"{used} of 512 tokens are used; {512 - used} are left")

    box = page.locator("#chat-box")
    assert box.evaluate("box => box.scrollHeight > box.clientHeight"), "all turns can be scrolled to"

    with run(page):
        press(page, "Regenerate", 2)
    turns(page, "Why is the sky blue?", "And the sea?")
    assert ids(page, 2) == theirs.ids(asked)

    press(page, "Edit", 1)
    expect(page.locator("#chat-editing")).to_contain_text("Editing turn 1")
    assert message(page) == "Why is the sky blue?"
    page.locator("#chat-cancel").click()
    turns(page, "Why is the sky blue?", "And the sea?")
    press(page, "Edit", 1)
    expect(page.locator("#chat-cancel")).to_be_visible()
    send(page, "Why is snow white?")
    turns(page, "Why is snow white?")
    expect(page.locator("#chat-cancel")).to_be_hidden()
    assert ids(page, 1) == theirs.ids([asked[0], {"role": "user", "content": "Why is snow white?"}])

    page.locator("#chat-new").click()
    expect(page.locator(".sl-turn")).to_have_count(0)
    expect(page.locator("#chat-context")).to_contain_text("512 are left")
    expect(page.locator("#chat-prompt section")).to_have_count(0)


def test_markup_is_shown_as_text_and_a_turn_that_cannot_run_comes_back_into_its_field(page: Page) -> None:
    setting(page, "chat-system", HOSTILE)
    send(page, HOSTILE)
    turns(page, HOSTILE)
    ids(page, 1)
    expect(page.locator("#chat img, #chat-prompt b b, .sl-said strong")).to_have_count(0)
    assert page.evaluate("window.hacked") is None

    for typed, said in (("word " * 800, "or begin a new conversation"), ("  ", "message: '  '")):
        send(page, typed)
        expect(page.locator("#chat-error")).to_contain_text(said)
        turns(page, HOSTILE)
        assert message(page) == typed
    send(page, "Go on.")
    turns(page, HOSTILE, "Go on.")
    expect(page.locator("#chat-error .sl-error")).to_have_count(0)


def test_a_reload_brings_the_conversation_back_in_either_language_until_a_new_one(
    page: Page, browser: BrowserContext, url: str, tiny_model: TinyFactory
) -> None:
    setting(page, "chat-system", SYSTEM)
    send(page, HOSTILE)
    page.reload()
    page.get_by_role("tab", name="Chat").click()
    turns(page, HOSTILE)
    expect(page.locator(".sl-turn .sl-verdict")).to_contain_text("Identical")
    expect(page.locator("#chat-system").locator("input, textarea").first).to_have_value(SYSTEM)
    page.evaluate(COUNT)
    send(page, "Go on.")
    turns(page, HOSTILE, "Go on.")
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": HOSTILE}]
    theirs = Transformers(tiny_model())
    asked += [{"role": "assistant", "content": theirs.answer(asked)}, {"role": "user", "content": "Go on."}]
    assert ids(page, 2) == theirs.ids(asked)

    other = browser.new_page()
    other.goto(f"{url}/?language=zh")
    other.get_by_role("tab").nth(1).click()
    turns(other, HOSTILE, "Go on.")
    expect(other.locator(".sl-turn header").first).to_contain_text("第 1 轮")
    assert other.evaluate("window.hacked") is None
    other.close()
    browser.clear_cookies()  # which keep the language
    page.locator("#chat-new").click()
    expect(page.locator(".sl-turn")).to_have_count(0)
    page.reload()
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-context")).to_contain_text("left")
    expect(page.locator(".sl-turn")).to_have_count(0)


def long_run(page: Page) -> None:
    """Begin a turn of many seconds, with no KV cache."""
    page.get_by_role("tab", name="Answers").click()
    page.locator("#settings > button").click()
    setting(page, "max_new_tokens", "480")
    page.get_by_label("Ignore the end token").check()
    page.locator("#flags > button").click()
    page.get_by_label("none", exact=True).check()
    expect(page.locator("#flag-words").locator("input, textarea").first).to_have_value("none")
    page.get_by_role("tab", name="Chat").click()
    begin(page, "Two.")
    expect(page.locator("#chat-settings code")).to_have_text(["none", "none", "480", "0"])
    expect(page.locator("#chat-now section[data-state=running]")).to_be_visible(timeout=RUN_MS)


def test_turns_wait_for_each_other_and_a_stopped_one_leaves_the_conversation_as_it_was(
    page: Page, browser: BrowserContext, url: str
) -> None:
    send(page, "One.")
    other = chat(browser, url)
    long_run(other)
    press(page, "Regenerate", 1)
    expect(page.locator("#chat-status")).to_contain_text("You are number 1 in the queue")
    expect(page.locator("#chat-watch")).to_contain_text("Only the other visitor sees its prompt and answers.")
    expect(page.locator(".sl-turn-do button").filter(visible=True)).to_have_count(0)
    page.locator("#chat-stop").click()
    expect(page.locator("#chat-stop")).to_be_disabled()
    with run(page), run(other):
        other.locator("#chat-stop").click()
    expect(other.locator("#chat-now section[data-state=stopped]").first).to_be_visible()
    other.close()

    expect(page.locator("#chat-status")).to_have_text("Stopped.")
    expect(page.locator("#chat-now section[data-state=stopped]")).to_have_count(2)
    expect(page.locator("#chat-now")).to_contain_text("it is not part of the conversation")
    expect(page.locator("#chat-editing")).to_contain_text("Editing turn 1.")
    assert message(page) == "One."
    page.locator("#chat-cancel").click()
    turns(page, "One.")
    expect(page.locator("#chat-past .sl-verdict")).to_contain_text("Identical")


def test_a_turn_that_is_taken_back_before_it_runs_is_not_run(page: Page, browser: BrowserContext, url: str) -> None:
    other = chat(browser, url)
    long_run(other)
    begin(page, "One.")
    expect(page.locator("#chat-status")).to_contain_text("You are number 1 in the queue")
    # As over a slow link, where the answer that disables the button comes after the press.
    page.locator("#chat-new").evaluate("button => { button.disabled = false; button.click(); }")
    turns(page)
    with run(page), run(other):
        other.locator("#chat-stop").click()
    other.close()
    expect(page.locator("#chat-error .sl-error")).to_have_count(0)
    send(page, "Two.")
    turns(page, "Two.")


def test_what_is_typed_after_send_or_before_regenerate_stays_in_the_field(page: Page) -> None:
    with run(page):
        with unanswered(page):
            with page.expect_request(lambda request: "One." in (request.post_data or "")):  # Gradio reads fields late
                begin(page, "One.")
            page.locator("#chat-message textarea").press_sequentially(" Two.")
        expect(page.locator("#chat-message textarea")).to_have_value(" Two.")
    turns(page, "One.")
    with run(page):
        press(page, "Regenerate", 1)
    turns(page, "One.")
    assert message(page) == " Two."
    setting(page, "chat-system", "word " * 800)
    send(page, "Three.")
    expect(page.locator("#chat-error")).to_contain_text("or begin a new conversation")
    assert message(page) == "Three."
