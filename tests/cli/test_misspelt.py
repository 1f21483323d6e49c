"""A misspelt name is one line that says which was meant."""

from pathlib import Path

import pytest

from splitlearn.cli import main as command_line
from splitlearn.errors import did_you_mean


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["comapre"], "Did you mean 'compare'?"),
        (["compare", "--flgs", "all"], "--flags"),
        (["compare", "--flags", "usecache"], "did you mean use_cache?"),
        (["compare", "--flags", "USE_CACHE"], "did you mean use_cache?"),
        (["compare", "--flags", "fastfloat32"], "did you mean fast-float32?"),
        (["compare", "--flags", "ful:all"], "did you mean full:?"),
        (["compare", "--link", "wify"], "did you mean wifi?"),
        (["fetch", "--config", "config.yaml"], "did you mean smollm2-135m-instruct?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_name_is_one_line_with_the_one_that_was_meant(
    arguments: list[str],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: smollm2-135m-instrct}")
    monkeypatch.chdir(tmp_path)
    assert command_line.main(arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and meant in line and said.out == ""


@pytest.mark.parametrize("word", ["", "xyz", "nonsense", "x" * 100_000])
def test_a_word_that_resembles_no_name_gets_no_suggestion(word: str) -> None:
    assert did_you_mean(word, ["use_cache", "none"]) == ""
