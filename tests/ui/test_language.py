"""The languages of the page: every text has its Chinese, and each visitor reads the language she chose."""

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from html import unescape

import pytest
from starlette.requests import Request

from splitlearn.arms.compare import KINDS
from splitlearn.flags.registry import FLAGS
from splitlearn.link.words import PRESETS
from splitlearn.metrics import PARTS
from tests.support import ROOT
from ui.compare.examples import EXAMPLES
from ui.compare.session import ArmView, State
from ui.compare.view import STATES, now
from ui.language import choice, translation
from ui.language.catalogue import catalogue, chinese, names

KEYWORDS = {"label", "info", "placeholder"}
MADE = {"Button", "Accordion", "Tab", "DownloadButton"}


def written() -> Iterator[tuple[str, str]]:
    """Each text that a component of the page is made with, and where: a literal, or a constant of its module."""
    for path in sorted((ROOT / "ui").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            given = [each.value for each in call.keywords if each.arg in KEYWORDS]
            if isinstance(call.func, ast.Attribute) and call.func.attr in MADE:
                given += call.args[:1]
            for each in given:
                value = constants.get(each.id) if isinstance(each, ast.Name) else each
                if (
                    isinstance(value, ast.Constant)
                    and isinstance(value.value, str)
                    and re.search("[A-Za-z]", value.value)
                ):
                    yield value.value, f"{path.relative_to(ROOT)}:{call.lineno}"


def constants() -> Iterator[tuple[str, str]]:
    """What tables of the program bring to the page."""
    for flag in FLAGS.values():
        yield flag.help, flag.name
    for name, preset in PRESETS.items():
        yield preset.source, name
    yield from ((text, name) for name, text in PARTS.items())
    for example in EXAMPLES:
        yield from ((example.label, "examples"), (example.look, "examples"))


def test_every_text_of_a_component_and_of_a_table_has_its_chinese() -> None:
    missing = {text: where for text, where in (*written(), *constants()) if chinese(text) is None}
    assert not missing, f"to add to ui/language/zh_CN.toml: {missing}"


def test_a_text_and_its_chinese_take_the_same_values() -> None:
    assert {text for text, said in catalogue().items() if not names(said) <= names(text)} == set()


def test_each_text_stands_once_in_the_catalogue() -> None:
    sections = tomllib.loads((ROOT / "ui/language/zh_CN.toml").read_text(encoding="utf-8")).values()
    assert sum(map(len, sections)) == len(catalogue())


def test_a_text_with_values_is_found_by_its_template() -> None:
    said = "Splitting is faster here: the fastest cut, trunk layers [2, 28), would take 9.1 ms a token (0.90 times), "
    said += "the full model alone 10.1 ms a token; the client needs 250 MB at least, against 600 MB."
    found = chinese(said)
    assert found is not None and "[2, 28)" in found and "250 MB" in found
    assert chinese("no text of the program") is None


def test_the_texts_and_names_in_html_are_translated_and_what_a_visitor_wrote_is_not() -> None:
    given = (
        '<section aria-label="Comparison"><p>Stopped.</p><div dir="auto"><b>Stopped.</b></div><p>Stopped.</p></section>'
    )
    assert translation.html(given) == (
        '<section aria-label="比较结果"><p>已停止。</p><div dir="auto"><b>Stopped.</b></div><p>已停止。</p></section>'
    )


@pytest.mark.parametrize("state", STATES)
def test_what_an_arm_does_is_in_chinese_whether_it_runs_once_or_often(state: State) -> None:
    for kind, asked in itertools.product(KINDS, (1, 3)):
        said = now(ArmView(kind, state), asked)
        assert not re.search("[A-Za-z]", chinese(said) or said), said


def test_what_stands_after_a_style_or_a_script_is_translated_whatever_is_in_it() -> None:
    given = '<style>a { syntax: "<integer>"; }</style><script>if (a <b) c = "<p>Stopped."</script>'
    assert translation.html(f"{given}<p>Stopped.</p>") == f"{given}<p>已停止。</p>"


def test_markup_in_a_visitors_text_stays_escaped() -> None:
    given = "<p>unavailable: &lt;script&gt;</p>"
    assert unescape(translation.html(given)) == "<p>不可用：<script></p>"
    assert "<script>" not in translation.html(given)


@pytest.mark.parametrize(
    ("query", "cookie", "accept", "expected"),
    [
        ("", "", "", "en"),
        ("", "", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("", "", "fr-FR,en;q=0.9,zh;q=0.8", "en"),
        ("", "language=en", "zh-CN", "en"),
        ("language=zh", "language=en", "en-US", "zh"),
        ("language=<script>", "language=xx", "*", "en"),
    ],
)
def test_the_address_decides_then_the_cookie_then_the_browser(
    query: str, cookie: str, accept: str, expected: str
) -> None:
    headers = [(b"cookie", cookie.encode()), (b"accept-language", accept.encode())]
    scope = {"type": "http", "path": "/", "query_string": query.encode(), "headers": headers}
    assert choice.of(Request(scope)) == expected
