"""What is drawn, without a browser: the states of a comparison, their HTML, and the words for flags."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from typing import cast

import pytest

from splitlearn.arms.compare import DivergentLogits
from splitlearn.arms.report import ArmReport, Item, Restart
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind, Texts, TokenCandidates
from splitlearn.client.served import TrunkFacts
from splitlearn.config import GenerationConfig
from splitlearn.errors import InputError, SplitlearnError, TrunkUnavailable
from splitlearn.events import Candidate, Done, GenerationRequest, Reconnecting, Recovery, TokenEvent
from splitlearn.flags.registry import SIDES, Place
from splitlearn.flags.selection import FlagSet, availability, parse
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics
from ui import inputs
from ui.compare import session, view
from ui.compare.command import command
from ui.compare.progress import progress
from ui.compare.session import ArmView, ComparisonView
from ui.compare.time import picture
from ui.flags import flag_words
from ui.language import translation

KNOWN = availability(dict.fromkeys(SIDES, Place("cpu", "there is no Python tokenizer", has_compiler=True)))
REQUEST = GenerationRequest("Why?")
TYPED = {"max_new_tokens": "8", "temperature": "0,5", "top_k": "0", "top_p": "1", "repetition_penalty": "1"}
TYPED |= {
    "seed": "7",
    "samples": "2",
    "prompt": "Why?",
    "pairs": "1",
    "link": "none",
    "form": "raw",
    "ignore_eos": "",
    "stop": "\n\nEnd\n",
}


def report(kind: Kind, ids: Sequence[int], text: str = "Because.") -> ArmReport:
    """A run that gave `ids`, one each 10 ms, with 100 bytes up and 200 down for each."""
    ledger = {"model": 0.009, "unattributed": 0.001}
    steps = [TokenEvent((token,), "", 0.01 * (n + 1), ledger, 0.0, 100, 200) for n, token in enumerate(ids)]
    metrics = RunMetrics.from_events([*steps, Done("length", text, 3)])
    assert metrics is not None
    trunk = TrunkFacts(1, 0.5, 10_000_000, 30_000_000) if kind == "split" else None
    address = "127.0.0.1:1" if trunk else None
    texts = Texts(tokens=(tuple(map(str, ids)),))
    return ArmReport(
        kind, metrics, 0.5, 0.0, 100_000_000, 150_000_000, "float32", "cpu", 1, address, trunk, texts=texts
    )


def both(full: Sequence[int], split: Sequence[int], text: str = "Because.") -> ComparisonView:
    reports = [report("full", full, text), report("split", split, text)]
    one, other = (ArmView(each.kind, "done", each.metrics, (each,)) for each in reports)
    return ComparisonView(one, other)


class ScriptedRuns:
    """Arms that do as they are told: items to yield, or an error to raise after them."""

    def __init__(self, full: Sequence[Item | SplitlearnError], split: Sequence[Item | SplitlearnError]) -> None:
        self.items = {"full": full, "split": split}

    def stream(
        self, kind: Kind, flags: FlagSet, request: GenerationRequest, stop: threading.Event, link: Link | None
    ) -> Iterator[Item]:
        for item in self.items[kind]:
            if isinstance(item, SplitlearnError):
                raise item
            yield item


SAMPLED: list[tuple[Kind, list[int], str]] = [
    ("full", [1, 2, 3], "Because."),
    ("split", [1, 2, 3], "Because."),
    ("split", [1, 2, 4], "Why not?"),
]


def states(runs: ScriptedRuns, stop: threading.Event | None = None) -> list[ComparisonView]:
    return list(session.compare(cast(Runs, runs), FlagSet(), REQUEST, stop or threading.Event()))


TOKEN = TokenEvent((1,), "a", 0.01, {"unattributed": 0.01})


def test_the_full_result_stays_when_the_split_arm_fails() -> None:
    last = states(ScriptedRuns([TOKEN, report("full", [1])], [TOKEN, TrunkUnavailable("It has gone.")]))[-1]
    assert last.full.reports
    assert (last.split.state, last.split.error) == ("failed", "It has gone.")
    assert last.split.metrics is not None  # what came before the failure
    assert "Split: It has gone." in view.errors(last)


def test_a_request_at_fault_is_said_once() -> None:
    wrong = InputError("prompt", "x", "less")
    assert states(ScriptedRuns([wrong], [wrong]))[-1] == ComparisonView(error=str(wrong))


def test_a_run_that_compiled_begins_again() -> None:
    seen = states(ScriptedRuns([TOKEN, Restart(), TOKEN, report("full", [1])], [report("split", [1])]))
    assert "compiled" in [shown.full.state for shown in seen]
    assert seen[-1].full.metrics is not None
    assert seen[-1].full.metrics.n_tokens == 1


def test_a_stop_before_the_second_arm_leaves_it_out() -> None:
    stop = threading.Event()
    stop.set()
    last = states(ScriptedRuns([report("full", [1])], [report("split", [1])]), stop)[-1]
    assert (last.full.state, last.split.state) == ("stopped", "stopped")


def test_from_the_first_pair_on_the_status_says_how_long_it_will_take() -> None:
    runs = cast(Runs, ScriptedRuns([report("full", [1])], [report("split", [1])]))
    seen = list(session.compare(runs, FlagSet(), REQUEST, threading.Event(), pairs=3))
    assert seen[0].left_s is None and "to go" not in view.status(seen[0])
    left = [shown.left_s for shown in seen if shown.left_s is not None]
    one = report("full", [1]).metrics.e2el_s + report("split", [1]).metrics.e2el_s
    assert left[0] == pytest.approx(2 * one) and left[-1] == 0
    assert left == sorted(left, reverse=True)


def test_tokens_are_drawn_about_four_times_a_second_however_fast_they_come() -> None:
    started = time.monotonic()
    seen = states(ScriptedRuns([TOKEN] * 5_000, []))
    drawn = sum(shown.full.state == "running" for shown in seen)
    assert drawn <= (time.monotonic() - started) / session.DRAW_S + 2


def test_what_a_model_writes_cannot_become_part_of_the_page() -> None:
    shown = both([1], [1], "<script>alert(1)</script>")
    assert "<script>" not in view.card(shown.full) + view.result(shown, "<b>")


def test_a_trunk_that_was_lost_and_found_is_told_on_its_card() -> None:
    metrics = report("split", [1, 2, 3]).metrics
    lost = replace(metrics, recoveries=((2, Recovery(0.84, "a:1", "b:2", 34)),))
    said = view.card(ArmView("split", "running", lost))
    assert "The trunk at a:1 was lost at token 2; reconnected to b:2 in 0.8 s, with 34 tokens replayed." in said
    assert "was lost" not in view.card(ArmView("split", "running", metrics))


def test_a_trunk_that_is_lost_is_told_while_it_is_looked_for_and_no_longer() -> None:
    lost = Reconnecting(2, 1.4, "a:1")
    items: list[Item | SplitlearnError] = [TOKEN, lost, TOKEN, report("split", [1])]
    seen = states(ScriptedRuns([report("full", [1])], items))
    at = next(n for n, shown in enumerate(seen) if shown.split.lost)
    assert "Reconnecting to the trunk server (attempt 2" in view.card(seen[at].split)
    assert view.status(seen[at]) == "Split: the trunk server was lost. Reconnecting, attempt 2."
    assert seen[at].split.metrics is not None  # what has come so far stays
    changes = [state for state, _ in groupby(shown.split.state for shown in seen[at:])]
    assert changes == ["reconnecting", "running", "between", "done"]
    assert not any("Reconnecting" in view.card(shown.split) for shown in seen[at + 1 :])


def test_a_trunk_that_is_lost_in_a_later_run_is_told_as_well() -> None:
    items: list[Item | SplitlearnError] = [TOKEN, Reconnecting(1, 0.1, "a:1"), TOKEN, report("split", [1])]
    runs = cast(Runs, ScriptedRuns([report("full", [1])], items))
    seen = [shown.split.state for shown in session.compare(runs, FlagSet(), REQUEST, threading.Event(), pairs=2)]
    changes = [state for state, _ in groupby(seen)]
    assert changes[-5:] == ["again", "reconnecting", "again", "between", "done"]


def test_each_sample_has_its_text_and_a_difference_in_any_is_named() -> None:
    full, split, other = (report(kind, ids, text) for kind, ids, text in SAMPLED)
    both_texts = Texts(tokens=(*full.texts.tokens, *split.texts.tokens))
    one = replace(full, others=(split.metrics,), texts=both_texts)
    two = replace(split, others=(other.metrics,), texts=Texts(tokens=(*split.texts.tokens, *other.texts.tokens)))
    arms = [ArmView(each.kind, "done", each.metrics, (each,), others=each.others) for each in (one, two)]
    card = view.card(arms[1])
    assert "Sample 1" in card and "Because." in card and "Sample 2" in card and "Why not?" in card
    assert "TPS (all 2)" in card and "200.0 /s" in card
    assert "from token 3 of sample 2 on" in view.result(ComparisonView(arms[0], arms[1]), "default")
    assert "Sample 1" not in view.card(replace(arms[0], others=()))


def test_identical_tokens_are_called_so() -> None:
    said = view.result(both([1, 2, 3], [1, 2, 3]), "default")
    assert "Identical: all 3 tokens are the same." in said
    assert "100 B" in said  # bytes up per token
    assert "150 MB <small>of 150 MB" in said  # libraries included


def test_a_ratio_that_the_two_cards_do_not_show_is_explained() -> None:
    def runs(kind: Kind, *seconds: float) -> ArmView:
        one = report(kind, [1, 2, 3])
        timed = [replace(one, metrics=replace(one.metrics, e2el_s=at, tpot_s=at)) for at in seconds]
        return ArmView(kind, "done", timed[0].metrics, tuple(timed))

    explained = escape(view.OF_PAIRS)
    steady = ComparisonView(runs("full", 0.10, 0.11, 0.12), runs("split", 0.20, 0.22, 0.24), n_pairs=3)
    assert explained not in view.result(steady, "default")
    uneven = ComparisonView(runs("full", 0.10, 0.11, 0.12), runs("split", 0.20, 0.11, 0.11), n_pairs=3)
    assert explained in view.result(uneven, "default")


@pytest.mark.parametrize(
    ("full", "split", "said"),
    [
        ([1, 2, 3], [1, 5, 3], "from token 2 on: full has &#x27;2&#x27;, split has &#x27;5&#x27;"),
        ([1, 2], [1, 2, 3], "from token 3 on: full has nothing, split has &#x27;3&#x27;"),
    ],
)
def test_the_first_difference_is_named_with_both_tokens(full: list[int], split: list[int], said: str) -> None:
    assert said in view.result(both(full, split), "default")


def test_the_parts_of_a_token_add_up_to_its_time() -> None:
    pairs = both([1, 2, 3], [1, 2, 3]).pairs
    assert pairs is not None
    said = picture(pairs)
    assert said.count(">9.00 ms") == 2 and said.count(">1.00 ms") == 2  # model and unattributed, in both arms
    assert said.count("10.00 ms") == 2


@pytest.mark.parametrize(
    "text",
    ["default", "none", "all", "use_cache", "inference_mode,use_cache", "float32_matmul_precision=high,use_cache"]
    + ["full:use_cache client:none trunk:default", "full:float32_matmul_precision=high client:all trunk:none"],
)
def test_words_for_flags_mean_the_flags_that_they_were_made_from(text: str) -> None:
    flags = parse(text, KNOWN)
    words = flag_words.words(flags, KNOWN)
    assert parse(words, KNOWN) == flags
    assert (":" in words) == (":" in text)


def test_one_flag_changes_on_every_side_that_can_have_it() -> None:
    flags = flag_words.with_choice(parse("none", KNOWN), "fast_top_k", "on", KNOWN)
    assert flags == FlagSet(full=frozenset({"fast_top_k"}), client=frozenset({"fast_top_k"}))
    assert flag_words.choice_of(flags, "fast_top_k", KNOWN) == "on"
    assert flag_words.with_choice(flags, "fast_top_k", "off", KNOWN) == FlagSet()
    assert flag_words.choice_of(parse("full:use_cache client:none trunk:none", KNOWN), "use_cache", KNOWN) is None


def test_a_prompt_is_shown_as_the_model_sees_it_with_control_tokens_marked() -> None:
    shown = both([1, 2, 3], [1, 2, 3])
    texts = Texts(prompt=(("<|user|>", True), ("<b>Hi", False)))
    said = view.prompt(shown.with_arm(replace(shown.full, reports=(replace(report("full", [1, 2, 3]), texts=texts),))))
    assert "<mark>&lt;|user|&gt;</mark>&lt;b&gt;Hi" in said
    assert view.prompt(ComparisonView()) == ""


def test_each_chat_template_has_a_form_of_its_own() -> None:
    assert [value for _, value in inputs.forms([])] == ["chat", "raw"]
    assert [value for _, value in inputs.forms(["default"])] == ["chat", "raw"]
    assert [value for _, value in inputs.forms(["default", "rag"])] == ["chat", "chat:rag", "raw"]
    assert [value for _, value in inputs.forms(["rag", "tool_use"])] == ["chat:rag", "chat:tool_use", "raw"]
    for chat in (True, False, "rag"):
        assert inputs.request({**TYPED, "form": inputs.form(chat)}).chat == chat
    assert inputs.form("default") == "chat"


def test_what_is_typed_becomes_a_request() -> None:
    request = inputs.request(TYPED)
    assert (request.max_new_tokens, request.chat, request.ignore_eos, request.stop) == (8, False, False, ("End",))
    assert (request.sampling.temperature, request.sampling.seed, request.samples) == (0.5, 7, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", value) for value in ("0", "-1", "x", "", "1.5", None)]
    + [("temperature", value) for value in ("-1", "nan", "warm", None)]
    + [
        ("top_p", "0"),
        ("top_p", "2"),
        ("top_k", "-1"),
        ("seed", "1e3"),
        ("samples", "0"),
        ("samples", "x"),
        ("repetition_penalty", "inf"),
        ("prompt", ""),
    ],
)
def test_what_cannot_be_used_names_its_field(field: str, value: str | None) -> None:
    with pytest.raises(InputError) as caught:
        inputs.request({**TYPED, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("lines", ["  ", "Why?\n" * 1001])
def test_an_experiment_without_a_prompt_or_with_too_many_is_refused(lines: str) -> None:
    typed = {**inputs.lab_at_first(GenerationConfig()), "design": "without", "limit": "decided", "prompts": lines}
    with pytest.raises(InputError, match="prompts"):
        inputs.experiment(typed, "default", "  ")


def test_where_tokens_differ_the_candidates_of_both_stand_with_what_each_chose() -> None:
    listed = (Candidate(7, "<b>cat", 12.5, -0.6931), Candidate(9, " dog", 12.4999, -0.6932))
    logits = DivergentLogits(TokenCandidates(7, listed), TokenCandidates(9, listed[::-1]), (7, 9))
    drawn = view.result(replace(both([1, 7], [1, 9]), logits=logits), "none")
    full, split = drawn.split('aria-label="Split: candidates"')
    assert "12.5000" in full and "50.00%" in full
    assert full.index("&#x27;&lt;b&gt;cat&#x27;</span></b> (chosen)") and "(chosen)" in split.partition("12.4999")[0]
    assert "another token" not in drawn
    assert "another token" in view.result(replace(both([1, 7], [1, 9]), logits=replace(logits, tokens=(7, 7))), "none")


def test_who_waits_sees_how_far_another_comparison_is_and_none_of_its_texts() -> None:
    shown = replace(both([1, 2, 3], [1, 2, 3]), n_pairs=3)
    running = replace(shown, split=replace(shown.split, state="running", reports=(), error="no <b>secret</b>"))
    said = progress(running)
    assert "Split, run 1 of 3: running." in said
    assert said.count("3 tokens, TTFT 10.0 ms, TPOT 10.0 ms.") == 2
    assert "Because" not in said and "secret" not in said
    assert not re.search("[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}", translation.html(said))
    assert progress(None) == ""


def test_the_command_that_repeats_a_comparison_gives_a_shell_its_prompt_and_nothing_that_a_terminal_acts_on() -> None:
    prompt = "it's \x1b[2J\u202eC:\\new\nline 中文"
    told = command(GenerationRequest(prompt), "auto", 1, None)
    assert not {char for char in told if not char.isprintable()} - {"\n"}
    shell = ["bash", "-c", f'told() {{ printf %s "$6"; }}; told {told}']
    given = subprocess.run(shell, capture_output=True, text=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert given.stdout == prompt
