"""What a load test asks for: lengths, shared prefixes, conversations, traces."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from splitlearn.cli import main as command_line
from splitlearn.errors import InputError
from splitlearn.loadtest.lengths import Lengths
from splitlearn.loadtest.plan import LoadTest, check_lengths, load_requests
from splitlearn.loadtest.texts import BLOCK, words
from splitlearn.loadtest.trace import TraceLine, read_trace, written
from tests.e2e.test_cli import Refusal, refusal
from tests.support.foreign import Asked, foreign, well

__all__ = ["refusal"]

LOAD = LoadTest(("Why is the sky blue?", "How?"), max_new_tokens=8)
UNIFORM = st.tuples(st.integers(1, 2000), st.integers(0, 2000)).map(lambda at: Lengths("uniform", at[0], sum(at)))
CURVES = st.builds(Lengths, st.just("normal"), st.integers(1, 900), st.integers(0, 300)) | st.builds(
    Lengths, st.just("lognormal"), st.integers(1, 900), st.sampled_from([0.0, 0.25, 0.5, 1.5])
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
LINES = st.builds(
    TraceLine,
    st.integers(0, 80_000 * 10**6).map(lambda us: us / 1e6),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.lists(st.integers(0, 2**70)).map(tuple),
)
NAMED = st.tuples(LINES, TEXTS).map(lambda at: replace(at[0], words=1, text=at[1]))


@given(UNIFORM | CURVES, st.integers())
def test_lengths_are_whole_and_within_their_bounds_and_the_same_for_a_seed(lengths: Lengths, seed: int) -> None:
    one, again = ([lengths.draw(dice) for _ in range(50)] for dice in (random.Random(seed), random.Random(seed)))
    assert one == again
    assert all(isinstance(each, int) and 1 <= each <= lengths.longest for each in one)


@given(UNIFORM | CURVES)
def test_lengths_are_written_as_they_are_read(lengths: Lengths) -> None:
    assert Lengths.parse(str(lengths), "answers") == lengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100-200", stats.randint(100, 201)),
        ("normal:500:40", stats.norm(500, 40)),
        ("lognormal:300:0.5", stats.lognorm(0.5, scale=300)),
    ],
)
def test_lengths_have_the_distribution_they_name(text: str, expected: Any) -> None:
    dice, lengths = random.Random(1), Lengths.parse(text, "lengths")
    drawn = [lengths.draw(dice) for _ in range(4000)]
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert pd.Series(drawn).quantile(q) == pytest.approx(expected.ppf(q), rel=0.04)


@given(st.integers(1, 3000), st.text())
def test_a_made_up_text_has_its_words_and_is_its_keys_own(count: int, key: str) -> None:
    text = words(count, key)
    assert len(text.split()) == count
    assert words(count, key) == text
    if count > 6:
        assert words(count, key + "x").split()[:6] != text.split()[:6]


def test_made_up_prompts_have_the_lengths_and_none_is_asked_twice() -> None:
    load = replace(LOAD, prompt_words=Lengths.parse("20-40", "prompt_words"), prefix_words=7)
    prompts = [load.text(job.prompt) for stream in (0, 1) for job in islice(load_requests(load, stream), 300)]
    lengths = {len(prompt.split()) - 7 for prompt in prompts}
    assert lengths <= set(range(20, 41))
    assert {min(lengths), max(lengths)} == {20, 40}
    assert len(set(prompts)) == len(prompts)
    assert len({prompt.partition("\n\n")[0] for prompt in prompts}) == 1, "the prefix is shared"
    assert load.text(3) != replace(load, seed=1).text(3)


def test_the_turns_of_a_conversation_come_with_its_first_request() -> None:
    load = replace(LOAD, turns=3, prefix_words=4)
    for job in islice(load_requests(load, 0), 20):
        assert [each.turn for each in (job, *job.rest)] == [0, 1, 2]
        assert load.text(job.prompt, 0).endswith(load.text(job.prompt, 1))
        assert load.text(job.prompt, 1) in LOAD.prompts


@given(st.lists(LINES | NAMED, min_size=1, max_size=20))
def test_a_trace_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, lines: list[TraceLine]) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    path.write_text(written(lines), encoding="utf-8")
    found = read_trace(path)
    wanted = sorted(lines, key=lambda line: line.at_s)
    assert [replace(line, at_s=0.0) for line in found] == [replace(line, at_s=0.0) for line in wanted]
    assert [line.at_s for line in found] == pytest.approx([line.at_s - wanted[0].at_s for line in wanted], abs=2e-6)


def test_what_has_the_same_hash_in_a_trace_begins_with_the_same_words() -> None:
    one, other, apart = (TraceLine(0.0, 1200, 5, blocks) for blocks in ((7, 8, 9), (7, 8, 3), (1, 2, 3)))
    load = replace(LOAD, trace=(one, other, apart, TraceLine(0.0, 1200, 5), TraceLine(0.0, 1200, 5)))
    texts = [load.text(number).split() for number in range(5)]
    assert [len(text) for text in texts] == [1200] * 5
    assert texts[0][: 2 * BLOCK] == texts[1][: 2 * BLOCK]
    assert texts[0][2 * BLOCK :] != texts[1][2 * BLOCK :]
    assert len({tuple(text[:6]) for text in texts}) == 4, "only what shares a hash begins alike"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        '{"timestamp": 1}',
        '{"timestamp": -1, "input_length": 5, "output_length": 5}',
        '{"timestamp": NaN, "input_length": 5, "output_length": 5}',
        '{"timestamp": 1, "input_length": 0, "output_length": 5}',
        '{"timestamp": 1, "input_length": true, "output_length": 5}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1e9}',
        '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": ["a"]}',
        '{"timestamp": 1, "text_input": " ", "output_length": 5}',
        "[" * 100_000,
        '"' + "x" * (9 << 20),
        '{"timestamp": 99e9, "input_length": 5, "output_length": 5}',
    ],
    ids=lambda line: line[:50],
)
def test_a_line_that_is_no_request_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(written([TraceLine(0.0, 5, 5)]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 3' cannot be used; expected a JSON object"):
        read_trace(path)


def test_what_does_not_fit_into_the_context_is_refused_before_the_load() -> None:
    check_lengths([(40, 10), (10, 20)], 2, 100)
    check_lengths([(10**9, 10)], 5, None)
    with pytest.raises(InputError, match="one of 40 tokens with 10 new ones, 3 turns"):
        check_lengths([(40, 10), (10, 20)], 3, 100)
    check_lengths([(40, 10)], 3, 90, prefix=30)  # 40 + 10 + 2 * (10 + 10)
    with pytest.raises(InputError, match="prompts of at most 39 tokens: the context holds 89"):
        check_lengths([(40, 10)], 3, 89, prefix=30)


def load_at(url: str, *arguments: str) -> list[str]:
    return ["loadtest", "--url", url, "--duration", "0.5", *arguments]


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command against a server and gives the bodies that came after the first request and each client's."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[dict[str, Any]]:
        with foreign(well) as server:
            assert command_line.main(load_at(server.url, "--clients", "1", "--json", *arguments)) == 0
        return [asked.body for asked in server.asked[2:]]

    return run


def test_a_conversation_sends_what_was_said_and_a_new_one_begins_anew(
    requests: Callable[..., list[dict[str, Any]]],
) -> None:
    bodies = requests("--turns", "3", "--prefix-words", "5", "--out", "found")
    said = [body["messages"] for body in bodies]
    assert [len(messages) for messages in said][:4] == [1, 3, 5, 1]
    for before, after in pairwise(said):
        if len(after) > 1:
            assert after[:-2] == before
            assert [message["role"] for message in after[-2:]] == ["assistant", "user"]
            assert set(after[-2]["content"].split()) == {"so"}, "the server's own answer"
    firsts = {messages[0]["content"].partition("\n\n")[0] for messages in said}
    assert len(firsts) == 1
    assert len(firsts.pop().split()) == 5
    assert not Path("found/trace.jsonl").exists()
    assert set(pd.read_csv("found/requests.csv")["turn"]) == {0, 1, 2}


def test_a_conversation_ends_with_an_answer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def once(asked: Asked) -> None:
        await (asked.status("500 Oh") if len(asked.body["messages"]) > 1 else well(asked))

    with foreign(once) as server:
        assert command_line.main(load_at(server.url, "--turns", "4", "--out", "found", "--json")) == 0
    assert set(pd.read_csv("found/requests.csv")["turn"]) == {0, 1}


def test_a_load_can_be_replayed_from_its_own_trace(
    requests: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(bodies: list[dict[str, Any]]) -> list[tuple[str, int]]:
        return [(body["messages"][0]["content"], body["max_tokens"]) for body in bodies]

    first = asked(requests("--rate", "20", "--prompt-words", "5-9", "--answer-tokens", "2-6", "--out", "one"))
    assert len(first) > 3
    capsys.readouterr()
    again = asked(requests("--trace", "one/trace.jsonl", "--out", "two", "--seed", "5"))
    found = json.loads(capsys.readouterr().out)
    assert again == first
    assert found["loop"] == f"a trace of {len(first)} requests"
    assert found["summary"]["offered"] == found["summary"]["done"] == len(first)
    one, two = (read_trace(Path(name) / "trace.jsonl") for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt-words", "many"), "prompt_words: 'many' cannot be used; expected a length such as 128"),
        (("--prompt-words", "0"), "prompt_words: '0' cannot be used"),
        (("--prompt-words", "9-3"), "prompt_words: '9-3' cannot be used"),
        (("--prompt-words", "9" * 30), "prompt_words: '999"),
        (("--answer-tokens", "normal:5"), "answers: 'normal:5' cannot be used"),
        (("--answer-tokens", "lognormal:5:900"), "answers: 'lognormal:5:900' cannot be used"),
        (("--answer-tokens", "1"), "answers: '1' cannot be used; expected 2 tokens or more"),
        (("--answer-tokens", "8", "--max-new-tokens", "8"), "--max-new-tokens: 8 cannot be used; expected none"),
        (("--turns", "0"), "turns: 0 cannot be used; expected a whole number from 1 to 100"),
        (("--turns", "two"), "turns: 'two' cannot be used"),
        (("--turns", "2", "--replay"), "replay: True cannot be used; expected one turn"),
        (("--turns", "2", "--completions", "--url", "http://here/v1"), "--turns: 2 cannot be used"),
        (("--prefix-words", "-1"), "prefix_words: -1 cannot be used"),
        (("--trace", "none.jsonl"), "trace: 'none.jsonl' cannot be used; expected a readable file (No such file"),
        (("--trace", "."), "trace: '.' cannot be used; expected a readable file"),
        (("--trace", "empty.jsonl"), "trace: 'empty.jsonl' cannot be used; expected requests, one a line"),
        (("--trace", "good.jsonl", "--rate", "3"), "trace: 1 cannot be used; expected a trace alone"),
        (("--trace", "good.jsonl", "--prompts", "good.jsonl"), "--prompts: 'good.jsonl' cannot be used; expected none"),
    ],
)
def test_work_that_cannot_be_asked_for_is_refused_in_one_line(
    arguments: tuple[str, ...], said: str, refusal: Refusal, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "good.jsonl").write_text(written([TraceLine(0.0, 5, 5)]))
    assert re.search(re.escape(said), refusal.of(tmp_path, "loadtest", *arguments))
