"""Tool calls in a model's text: found in whatever pieces it comes, and nothing of it is lost."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.chat_template import TemplateFailed
from splitlearn.errors import InputError, ModelError
from splitlearn.events import GenerationRequest, Message
from splitlearn.generation.tokenizer import Tokens
from splitlearn.generation.tool_calls import CallForm, CallReader, syntax_of
from splitlearn.runtime import private_apis
from splitlearn.tools import Tool, ToolCall
from tests.support.caller import CHAT_TEMPLATE
from tests.support.tiny import CHAT_TEMPLATE as WITHOUT_TOOLS
from tests.support.tiny import make_tokenizer

LOOK = Tool("look", "Looks.", '{"type": "object", "properties": {"place": {"type": "string"}}}')
HERMES = private_apis.shipped_response_templates()[0]
WORDS = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | WORDS, lambda each: st.lists(each, max_size=3))
ARGUMENTS = st.dictionaries(WORDS, VALUES, max_size=3)
OWN = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def read(pieces: list[str], template: dict[str, Any] = HERMES, prompt: str = "") -> tuple[str, list[ToolCall]]:
    reader = CallReader(template, prompt, [LOOK])
    text = "".join(reader.feed(piece) for piece in pieces) + reader.finish()
    return text, list(reader.take())


def written(arguments: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def split(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.lists(WORDS | ARGUMENTS, max_size=5), st.lists(st.integers(0, 10_000), max_size=30))
@example([{}, "0\x1f"], [59])  # white space apart from the text behind a call
def test_in_any_pieces_the_calls_are_found_and_the_other_text_is_shown(parts: list[Any], cuts: list[int]) -> None:
    text = "".join(part if isinstance(part, str) else written(part) for part in parts)
    shown, calls = read(split(text, cuts))
    assert (shown, calls) == read([text])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("look", part) for part in parts if isinstance(part, dict)
    ]
    assert "".join(shown.split()) == "".join("".join(part for part in parts if isinstance(part, str)).split())


@pytest.mark.parametrize(
    "body",
    ['{"name": "look", "arguments": {', "look at the sky", "[1]", '{"name": 3}', '{"name": "look", "arguments": [1]}'],
)
def test_what_is_no_call_is_text_without_its_marks(body: str) -> None:
    shown, calls = read(list(f"A<tool_call>{body}</tool_call>B{written({'place': 'sky'})}"))
    assert shown == f"A{body}B"
    assert calls == [ToolCall("look", '{"place": "sky"}')]


def test_a_call_that_the_answers_end_cuts_off_is_text_unless_it_is_whole() -> None:
    whole = '{"name": "look", "arguments": {}}'
    assert read(["<tool_call>" + whole[:-4]]) == (whole[:-4], [])
    assert read(["<tool_call>" + whole]) == ("", [ToolCall("look", "{}")])


@pytest.mark.parametrize("text", ["<think>Sky.</think>Blue.", "<think>Sk", "Sky.</think>Blue.", "A < b <tool_ c"])
def test_all_other_text_is_what_it_is_without_a_parser(text: str) -> None:
    assert read(list(text)) == (text, [])


def test_a_thought_that_the_prompt_began_is_one_and_calls_in_the_prompt_are_none() -> None:
    prompt = f"<|im_start|>user\n{written({})}<tool_call><|im_start|>assistant\n<think>"
    thought = f"{written({})}</think>"
    assert read([thought, "Blue."], prompt=prompt) == (f"{thought}Blue.", [])
    assert read(["Blue."], prompt="<tool_call>") == ("Blue.", [])


def test_arguments_in_tags_get_the_types_of_the_tools_schema() -> None:
    reader = CallReader(
        private_apis.shipped_response_templates()[1],
        "",
        [Tool("add", "", '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}')],
    )
    call = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>"
    assert reader.feed(f"{call}\n</tool_call>") + reader.finish() == ""
    assert reader.take() == (ToolCall("add", '{"a": 1, "b": "2"}'),)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_a_model_whose_template_has_tools_is_read_by_the_form_that_its_template_writes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = syntax_of(tokenizer, CHAT_TEMPLATE)
    assert found.template == HERMES
    assert found.form == CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
    tokenizer.response_template = OWN
    assert syntax_of(tokenizer, CHAT_TEMPLATE).template == OWN


def test_a_model_that_writes_no_json_is_read_and_cannot_be_made_to_call(tokenizer: PreTrainedTokenizerFast) -> None:
    before, after = CHAT_TEMPLATE.split("{{- '<tool_call>")[0], CHAT_TEMPLATE.split("</tool_call>' }}")[1]
    tags = "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments.items() %}"
    tags += "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    tokenizer.chat_template = before + tags + after
    found = Tokens(tokenizer, frozenset()).call_syntax(True)
    assert (found.template, found.form) == (private_apis.shipped_response_templates()[1], None)


def test_marks_that_are_special_tokens_reach_the_parser(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = Tokens(tokenizer, frozenset({0}))
    request = GenerationRequest((Message("user", "Look."),), tools=(LOOK,))
    text, calls = tokens.readers(request, tokens.encode(request.prompt, True, request.tools))
    assert calls is not None
    ids = tokenizer.encode(f"<|end|>I do.{written({'place': 'sky'})}<|end|>", add_special_tokens=False)
    assert "".join(calls.feed(text.feed(token)) for token in ids) + calls.feed(text.flush()) + calls.finish() == "I do."
    assert calls.take() == (ToolCall("look", '{"place": "sky"}'),)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (WITHOUT_TOOLS, "has no place for tools"),
        (CHAT_TEMPLATE.replace("message.content", "'' if message.role == 'tool' else message.content"), "leaves"),
        (CHAT_TEMPLATE.replace("tool_call>", "a>"), "a form that cannot be read"),
        (CHAT_TEMPLATE + "{% if tools %}{{ raise_exception('Never.') }}{% endif %}", "Never."),
    ],
)
def test_a_template_that_cannot_be_used_with_tools_is_refused_with_the_reason(
    tokenizer: PreTrainedTokenizerFast, template: str, reason: str
) -> None:
    with pytest.raises(TemplateFailed, match=reason):
        syntax_of(tokenizer, template)
    tokenizer.chat_template = template
    asked = Message("user", "Look.")
    called = (asked, Message("assistant", "", (ToolCall("look", "{}", "a"),)), Message("tool", "Blue.", (), "a"))
    for prompt, tools in (((asked,), [LOOK]), (called, [])):
        with pytest.raises(InputError, match=reason) as refused:
            Tokens(tokenizer, frozenset()).encode(prompt, True, tools)
        assert refused.value.field == "tools"


ENDLESS = r"(?:x|x|xx)+y"


@pytest.mark.parametrize(
    "own",
    [
        {"fields": 3},
        {**OWN, "fields": {"tool_calls": {"open_pattern": "("}}},
        {**OWN, "fields": {"tool_calls": {**OWN["fields"]["tool_calls"], "transform": "{a.b}"}}},  # type: ignore[index]
    ],
)
def test_a_response_template_that_is_none_is_passed_over(
    tokenizer: PreTrainedTokenizerFast, own: dict[str, Any]
) -> None:
    tokenizer.response_template = own
    assert syntax_of(tokenizer, CHAT_TEMPLATE).template == HERMES


def test_a_response_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "CPU_S", 0.2)
    fields = {"tool_calls": {"open_pattern": ENDLESS, "content": "json"}, "content": {"content": "text"}}
    with pytest.raises(ModelError, match="s of CPU time"):
        read(["x" * 60 + "z"], {**OWN, "fields": fields})


def test_an_answer_is_read_on_by_another_process_when_the_first_has_ended() -> None:
    text = f"Sky.{written({'place': 'sky'})}Blue.{written({})}"
    reader, shown = CallReader(HERMES, "", [LOOK]), ""
    for at, letter in enumerate(text):
        shown += reader.feed(letter)
        if at % 40 == 39:
            chat_template.PROGRAM.close()
    assert (shown + reader.finish(), list(reader.take())) == read([text])


def test_a_template_gets_calls_and_results_as_transformers_describes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    call = ToolCall("look", '{"place": "sky"}', "a1")
    said = [Message("user", "Look."), Message("assistant", "", (call,)), Message("tool", "Blue.", (), "a1")]
    assert json.loads(chat_template.render(tokenizer, "{{ messages | tojson }}", said)) == [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a1", "type": "function", "function": {"name": "look", "arguments": {"place": "sky"}}}
            ],
        },
        {"role": "tool", "content": "Blue.", "tool_call_id": "a1", "name": "look"},
    ]


@pytest.mark.parametrize("bad", [lambda: Tool("a b"), lambda: Tool("a", "", "[]"), lambda: ToolCall("a", "{")])
def test_what_is_no_tool_and_no_call_is_refused(bad: Any) -> None:
    with pytest.raises(InputError):
        bad()
