"""The page in a real browser: what a person does with it, and what it says of what cannot be done."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, Route, TimeoutError, expect

from splitlearn.checkpoints.folder import ModelFiles
from tests.conftest import TinyFactory
from tests.support.page import (
    CHROMIUM,
    FORBIDDEN,
    App,
    open_page,
    running,
    setting,
    type_into,
    unanswered,
    write_config,
)
from ui.format import MISSING

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]

RUN_MS = 240_000
# Everything that the split card and the status line say from now on: a reconnection may be over before one looks.
RECORD = """() => {
  window.told = [];
  const text = name => document.getElementById(name).innerText;
  new MutationObserver(() => window.told.push([text('split'), text('status')]))
    .observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# Everything that the page says of the comparison it waits for.
RECORD_WATCH = """() => {
  window.told = [];
  const watch = document.getElementById('watch');
  new MutationObserver(() => window.told.push(watch.innerText))
    .observe(watch, {subtree: true, childList: true, characterData: true});
}"""
REACHES_ALL = "box => box.scrollHeight > box.clientHeight && box.scrollTop === 0"
# In a frame of its own, and much faster than a hand.
PRESS = "box => new Promise(done => requestAnimationFrame(() => { box.click(); done(); }))"
STREAMS = "document.querySelector('#split section[data-state=running] .sl-answer')?.innerText.trim()"


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tiny_model().folder
    generation = {"max_new_tokens": 16}
    config = write_config(tmp_path_factory.mktemp("page"), model={"name": str(folder)}, generation=generation)
    with running(config) as started:
        yield started


def fold_out(page: Page, name: str) -> None:
    page.locator(f"#{name} > button").click()


def rtt(page: Page, value: str) -> None:
    """Type the round-trip time of the link."""
    setting(page, "link-rtt_ms", value)
    page.locator("#link-rtt_ms").locator("input, textarea").first.press("Enter")


def verdict(page: Page, timeout_ms: int = RUN_MS) -> str:
    shown = page.locator("#result .sl-verdict")
    expect(shown).to_be_visible(timeout=timeout_ms)
    return shown.inner_text()


def error(page: Page) -> str:
    shown = page.locator("#error .sl-error")
    try:
        shown.wait_for(timeout=RUN_MS)
    except TimeoutError:  # what the fields hold tells more than the long tree of the page
        typed = page.evaluate("[...document.querySelectorAll('textarea, input[type=text]')].map(box => box.value)")
        pytest.fail(f"no error; fields {typed}, result {page.locator('#result').inner_text()!r}", pytrace=False)
    expect(page.locator("#compare")).to_be_enabled()
    return shown.inner_text()


def figures(page: Page, side: str) -> dict[str, str]:
    tiles = page.locator(f"#{side} .sl-tiles > div")
    return dict(zip(tiles.locator("dt").all_inner_texts(), tiles.locator("dd").all_inner_texts(), strict=True))


def compares(page: Page) -> None:
    """A comparison of a few tokens goes through: the page works."""
    page.locator("#compare").click()
    assert verdict(page).startswith("Identical")
    expect(page.locator("#compare")).to_be_enabled()


def test_one_press_shows_both_answers_their_figures_and_that_they_are_identical(page: Page) -> None:
    page.locator("#compare").click()
    assert verdict(page).startswith("Identical: all ")
    for side in ("full", "split"):
        expect(page.locator(f"#{side} section")).to_have_attribute("data-state", "done")
        assert page.locator(f"#{side} .sl-answer").inner_text().strip()
        shown = figures(page, side)
        assert list(shown) == ["TTFT", "TPOT", "TPS (decode)", "TPS (request)", "Tokens"]
        assert all(any(letter.isdigit() for letter in value) for value in shown.values())
    assert figures(page, "full")["Tokens"] == figures(page, "split")["Tokens"]
    result = page.locator("#result").inner_text()
    for part in ("TTFT, split / full", "TPOT, split / full", "3 pairs", "Bytes up", "split takes"):
        assert part in result
    page.locator("#time .sl-prompt summary").click()
    expect(page.locator("#time .sl-prompt mark")).to_have_text(["<|user|>", "<|end|>", "<|assistant|>"])
    expect(page.locator("#time svg")).to_be_visible()
    expect(page.locator("#time table")).to_contain_text("wire")
    page.locator("#full .sl-answer > div").evaluate("text => { text.innerText = 'a line\\n'.repeat(99); }")
    assert page.locator("#full .sl-answer").evaluate(REACHES_ALL), "a long answer can be scrolled to its beginning"


COUNTING = """
  window.frames_for_clocks = window.slow_clocks = 0;
  const frame = window.requestAnimationFrame.bind(window), timeout = window.setTimeout.bind(window);
  const is_clock = call => String(call).includes('performance.now');
  window.requestAnimationFrame = call => { window.frames_for_clocks += is_clock(call); return frame(call); };
  window.setTimeout = (call, ...rest) => { window.slow_clocks += is_clock(call); return timeout(call, ...rest); };
"""


def test_gradios_hidden_clock_takes_no_frame_from_what_is_measured(browser: BrowserContext, url: str) -> None:
    page = browser.new_page()
    page.add_init_script(COUNTING)
    page.goto(url)
    expect(page.locator("#compare")).to_be_enabled()
    compares(page)
    assert page.evaluate("window.slow_clocks") > 0
    assert page.evaluate("window.frames_for_clocks") == 0
    page.close()


def test_stop_ends_a_run_long_before_its_last_token_and_the_next_one_works(page: Page) -> None:
    fold_out(page, "settings")
    setting(page, "max_new_tokens", "450")
    page.get_by_label("Ignore the end token").check()
    fold_out(page, "flags")
    page.get_by_label("none", exact=True).check()  # without a KV cache the run takes many seconds
    expect(page.locator("#flag-words textarea, #flag-words input")).to_have_value("none")
    page.locator("#compare").click()
    expect(page.locator("section[data-state=running]")).to_be_visible(timeout=RUN_MS)
    page.locator("#stop").click()
    expect(page.locator("#compare")).to_be_enabled(timeout=RUN_MS)
    expect(page.locator("section[data-state=stopped]")).to_have_count(2)
    counts = [figures(page, side)["Tokens"] for side in ("full", "split")]
    assert MISSING in counts, "the arm whose turn had not come generates nothing"
    assert all(int(count) < 450 for count in counts if count != MISSING)
    assert page.locator("#result .sl-verdict").count() == 0
    setting(page, "max_new_tokens", "8")
    compares(page)


def test_flags_typed_before_the_page_has_heard_from_the_program_stay(browser: BrowserContext, url: str) -> None:
    late: list[Route] = []
    page = browser.new_page()
    page.route("**/queue/join*", lambda request: late.append(request))
    page.goto(url)
    fold_out(page, "flags")
    words = page.locator("#flag-words").locator("input, textarea").first
    expect(words).to_have_value("default")
    type_into(words, "none")
    assert late
    page.unroute("**/queue/join*")  # which lets those go that wait
    expect(page.locator("#flag-inference_mode input")).to_be_enabled()
    page.wait_for_timeout(500)
    expect(words).to_have_value("none")
    page.close()


@pytest.fixture(scope="module")
def asking(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A page that knows what its trunk can do. Each test of wrong input takes back what it did; the others follow in
    the order in which they stand."""
    opened = open_page(browser, url)
    fold_out(opened, "settings")
    fold_out(opened, "flags")
    fold_out(opened, "network")
    expect(opened.locator("#flag-words").locator("input, textarea").first).to_have_value("default")
    expect(opened.locator("#flag-inference_mode input")).to_be_enabled()
    yield opened
    opened.close()
    assert not FORBIDDEN


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prompt", "   ", "prompt: '   '"),
        ("prompt", "word " * 800, "at most"),
        *(("max_new_tokens", value, f"max_new_tokens: {value}") for value in (str(10**9), "'x'")),
        ("temperature", "nan", "temperature: nan"),
        ("samples", "2", "samples: 2"),
        ("flag-words", "no_such_flag", "no_such_flag"),
        ("flag-words", "full:float32_matmul_precision,float32_matmul_precision=high", "exclude each other"),
    ],
)
def test_bad_input_is_named_nothing_typed_is_lost(asking: Page, field: str, value: str, said: str) -> None:
    typed = value.strip("'")
    box = asking.locator(f"#{field}").locator("input, textarea").first
    right = box.input_value()
    box.fill(typed)
    asking.locator("#compare").click()
    shown = asking.locator("#error .sl-error")
    expect(shown).to_contain_text(said, timeout=RUN_MS)
    expect(shown).to_contain_text("expected")
    expect(asking.locator("#compare")).to_be_enabled()
    assert box.input_value() == typed
    box.fill(right)


def test_page_works_after_bad_input(asking: Page) -> None:
    setting(asking, "prompt", "")
    asking.locator("#compare").click()
    expect(asking.locator("#error .sl-error")).to_contain_text("prompt:", timeout=RUN_MS)
    setting(asking, "prompt", "Why is the sky blue?")
    compares(asking)
    assert asking.locator("#error .sl-error").count() == 0


def test_several_samples_are_shown_each_by_itself(asking: Page) -> None:
    for name, value in (("temperature", "0.8"), ("samples", "3")):
        setting(asking, name, value)
    asking.locator("#compare").click()
    for side in ("full", "split"):
        samples = asking.locator(f"#{side} .sl-answer .sl-small")
        expect(samples).to_have_text([f"Sample {at}" for at in (1, 2, 3)], timeout=RUN_MS)
        expect(asking.locator(f"#{side} .sl-tiles")).to_contain_text("TPS (all 3)", timeout=RUN_MS)
    assert verdict(asking).startswith("Identical")
    expect(asking.locator("#compare")).to_be_enabled()
    for name, value in (("samples", "1"), ("temperature", "0")):
        setting(asking, name, value)


def test_flags_of_each_side_follow_the_words_and_the_matrix_shows_them(asking: Page) -> None:
    words = asking.locator("#flag-words").locator("input, textarea").first
    expect(words).to_have_value("default")
    expect(asking.locator("#flag-cudnn_benchmark input")).to_be_disabled()
    expect(asking.locator("#flags")).to_contain_text("Unavailable: needs a CUDA device")
    asking.get_by_label("inference_mode", exact=True).first.uncheck()
    expect(words).not_to_have_value("default")
    type_into(words, "full:all client:use_cache trunk:none")
    words.blur()
    expect(asking.locator("#flag-use_cache input")).not_to_be_checked()  # the sides differ
    fold_out(asking, "by-side")
    row = asking.locator("#matrix tr", has_text="use_cache")
    assert row.locator("td").all_inner_texts()[1:] == ["applied", "applied", "available"]


def test_all_that_is_pressed_before_the_page_has_answered_the_first_press_counts(asking: Page) -> None:
    words = asking.locator("#flag-words").locator("input, textarea").first
    fold_out(asking, "sides")
    asking.get_by_label("none", exact=True).check()
    expect(words).to_have_value("none")
    names = ["inference_mode", "use_cache", "output_attentions"]
    boxes = [asking.locator(f"#flag-{name} input") for name in names]
    for box in boxes:
        expect(box).not_to_be_checked()
    for box in boxes:
        box.evaluate(PRESS)
    for name in names:
        expect(words).to_have_value(re.compile(name))
    for box in boxes:
        expect(box).to_be_checked()
    on_sides = asking.locator("#sides").get_by_label("inference_mode", exact=True)
    for box in on_sides.all():
        expect(box).to_be_checked()
    for box in on_sides.all():
        box.evaluate(PRESS)
    expect(words).to_have_value("use_cache,output_attentions")
    expect(boxes[0]).not_to_be_checked()


def test_a_flag_pressed_right_after_typing_is_added_to_what_was_typed(asking: Page) -> None:
    words = asking.locator("#flag-words").locator("input, textarea").first
    asking.get_by_label("none", exact=True).check()
    expect(words).to_have_value("none")
    type_into(words, "use_cache")
    asking.locator("#flag-output_attentions input").click()  # which takes the focus from the words
    expect(words).to_have_value("use_cache,output_attentions")
    for name in ("use_cache", "output_attentions"):
        expect(asking.locator(f"#flag-{name} input")).to_be_checked()


def test_a_comparison_has_all_that_was_pressed_before_it_and_nothing_that_was_typed_after(asking: Page) -> None:
    asking.get_by_label("none", exact=True).check()
    expect(asking.locator("#flag-words").locator("input, textarea").first).to_have_value("none")
    asking.locator("#pairs").get_by_label("1", exact=True).check()
    prompt = asking.locator("#prompt textarea")
    asking.get_by_role("button", name="A story").click()
    setting(asking, "prompt", "Before")
    with unanswered(asking):
        rtt(asking, "1")
        asking.locator("#flag-use_cache input").check()
        asking.locator("#compare").click()
        prompt.fill("After")
        prompt.press("Shift+Enter")
    command = asking.locator("#command textarea")
    for part in ("--prompt Before", "--flags use_cache", "--link rtt=1ms"):
        expect(command).to_have_value(re.compile(part), timeout=RUN_MS)
    expect(prompt).to_have_value("After")
    rtt(asking, "0")
    expect(asking.locator("#link input").first).to_have_value("Loopback")


def test_a_figure_typed_before_the_page_has_answered_which_link_was_chosen_changes_that_link(asking: Page) -> None:
    with unanswered(asking):
        asking.locator("#link input").click()
        asking.get_by_role("option", name="4G").click()
        rtt(asking, "77")
    expect(asking.locator("#link input").first).to_have_value("rtt=77ms,jitter=10ms,up=12mbit,down=12mbit")
    expect(asking.locator("#link-rtt_ms").locator("input, textarea").first).to_have_value("77")
    with unanswered(asking):
        rtt(asking, "33")
        asking.locator("#link input").click()
        asking.get_by_role("option", name="Loopback").click()
    expect(asking.locator("#link-about")).to_contain_text("No delay is added.")
    expect(asking.locator("#link input").first).to_have_value("Loopback")
    expect(asking.locator("#link-rtt_ms").locator("input, textarea").first).to_have_value("0")


def test_a_figure_of_the_link_that_cannot_be_used_stays_in_its_field_with_its_error(asking: Page) -> None:
    field = asking.locator("#link-rtt_ms").locator("input, textarea").first
    type_into(field, "abc")
    for _ in range(2):  # sent again, as the field is when it loses the focus
        with asking.expect_response("**/run/*"):
            field.press("Enter")
        expect(asking.locator("#link-error .sl-error")).to_contain_text("'abc' cannot be used")
        expect(field).to_have_value("abc")
    rtt(asking, "0")
    expect(asking.locator("#link-error .sl-error")).to_have_count(0)


def test_what_a_button_said_stays_while_flags_are_typed_and_wrong_flags_are_named_below_them(asking: Page) -> None:
    setting(asking, "prompt", "")
    asking.locator("#compare").click()
    said = error(asking)
    words = asking.locator("#flag-words").locator("input, textarea").first
    for typed, wrong in (("no_such_flag", 1), ("none", 0)):
        type_into(words, typed)
        words.blur()
        expect(asking.locator("#flags-error .sl-error")).to_have_count(wrong)
    expect(asking.get_by_label("none", exact=True)).to_be_checked()
    assert error(asking) == said


def test_a_trunk_killed_in_the_middle_is_started_again_and_its_answer_goes_on(page: Page, app: App) -> None:
    fold_out(page, "settings")
    setting(page, "max_new_tokens", "250")
    page.get_by_label("Ignore the end token").check()
    page.locator("#pairs").get_by_label("1", exact=True).check()
    fold_out(page, "flags")
    page.get_by_label("none", exact=True).check()  # without a KV cache the run takes many seconds
    expect(page.locator("#flag-words textarea, #flag-words input")).to_have_value("none")
    page.locator("#compare").click()
    page.evaluate(RECORD)
    page.wait_for_function(STREAMS, timeout=4 * RUN_MS)
    for trunk in app.trunks():  # the one that answers, and those of other tests' flags
        trunk.kill()
    assert verdict(page, 4 * RUN_MS).startswith("Identical")
    expect(page.locator("#split section")).to_have_attribute("data-state", "done")
    expect(page.locator("#split section")).to_contain_text("was lost at token")
    told = page.evaluate("window.told")
    assert any("Reconnecting to the trunk server (attempt 1" in split for split, _ in told)
    assert any("the trunk server was lost. Reconnecting, attempt 1." in status for _, status in told)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_nothing_scrolls_sideways_and_the_figures_come_early(
    browser: BrowserContext, url: str, width: int, height: int
) -> None:
    page = open_page(browser, url, width, height)
    fold_out(page, "settings")
    setting(page, "max_new_tokens", "96")
    fold_out(page, "settings")
    expect(page.locator("#max_new_tokens")).to_be_hidden()
    compares(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    top = page.locator("#result .sl-tiles").bounding_box()
    assert top is not None
    assert top["y"] + top["height"] < height
    page.close()


def test_closing_the_tab_ends_its_run(page: Page, browser: BrowserContext, url: str) -> None:
    fold_out(page, "settings")
    setting(page, "max_new_tokens", "450")
    page.locator("#pairs").get_by_label("10", exact=True).check()
    fold_out(page, "flags")
    page.get_by_label("none", exact=True).check()
    page.get_by_label("Ignore the end token").check()
    page.locator("#compare").click()
    expect(page.locator("section[data-state=running]")).to_be_visible(timeout=RUN_MS)
    other = open_page(browser, url)
    other.evaluate(RECORD_WATCH)
    other.locator("#compare").click()
    expect(other.locator("#watch p").first).to_be_visible()
    page.close()
    assert verdict(other, 4 * RUN_MS).startswith("Identical")
    assert not any("run 10 of 10" in text for text in other.evaluate("window.told")), "it went on to its end"
    other.close()


@pytest.mark.weights
def test_default_model_answers_in_both_arms_alike(
    browser: BrowserContext, default_model: ModelFiles, tmp_path: Path
) -> None:
    config = write_config(tmp_path, generation={"max_new_tokens": 16}, runs={"threads": 2})
    with running(config) as started:
        opened = open_page(browser, started.warm_url())
        opened.locator("#pairs").get_by_label("1", exact=True).check()
        opened.locator("#compare").click()
        assert verdict(opened).startswith("Identical")
        assert "sky" in opened.locator("#full .sl-answer").inner_text().lower()
