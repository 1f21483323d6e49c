"""A model's chat templates: several by name, those that make no text, and control tokens in a prompt."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints import chat_template, convert
from splitlearn.checkpoints.chat_template import TemplateFailed
from splitlearn.checkpoints.folder import ModelFiles, open_folder, seal
from splitlearn.cli import main as command_line
from splitlearn.errors import InputError, ModelError
from splitlearn.events import GenerationRequest, Message
from splitlearn.generation.tokenizer import Tokens
from splitlearn.runtime.progress import silent
from splitlearn.tools import Tool
from tests.support.tiny import CHAT_TEMPLATE, PRODUCTS, make_checkpoint, make_tokenizer

TOOLS = f"<|user|>tools:{CHAT_TEMPLATE}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
BROKEN = {
    "nothing": ("{# a comment #}", "renders nothing"),
    "only spaces": (" \n ", "renders nothing"),
    "empty": ("", "renders nothing"),
    "raises": ("{{ raise_exception('System role required') }}", "'System role required'"),
    "wrong names": ("{{ message.content.text.parts }}", "undefined"),
    "syntax": ("{% for m in messages %}\n{{ m['content'] }", "has a syntax error in line 2"),
    "unclosed": ("{% if messages %}", "has a syntax error in line 1"),
    "endless": (f"{LOOPS}{{% endfor %}}x", "s of CPU time"),
    "huge": ("{{ 'a' * 10000000000 }}", "MiB of memory"),
    "long": ("{{ 'ab' * 1000000 }}", "renders 2,000,000 characters"),
    "powers": ("{{ 10 ** 1000000000 }}", "takes more than"),
    "products": (PRODUCTS, "s of CPU time"),
    "half": ("{{ '\\ud800' }}", "renders half characters"),
    "sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
}


def tokens_with(templates: str | Mapping[str, str] | None) -> Tokens:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = templates
    return Tokens(tokenizer, frozenset())


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitlearn.checkpoints.chat_template.CPU_S", 0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", n_layers=3)


def converted(checkpoint: Path, folder: Path) -> ModelFiles:
    folder.mkdir()
    seal(folder, "test", convert.convert(checkpoint, folder, None, silent), silent)
    return open_folder(folder, str(folder))


def name_templates(checkpoint: Path, as_folder: bool) -> None:
    """Give the model templates called default and tool_use, the way that `as_folder` says."""
    if as_folder:
        (checkpoint / "additional_chat_templates").mkdir(exist_ok=True)
        (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
        return
    (checkpoint / "chat_template.jinja").unlink()
    path = checkpoint / "tokenizer_config.json"
    listed = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": TOOLS}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))


@pytest.mark.parametrize("as_folder", [True, False])
def test_several_templates_load_and_each_can_be_chosen(tmp_path: Path, as_folder: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", n_layers=2)
    usual = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    name_templates(checkpoint, as_folder)
    files = converted(checkpoint, tmp_path / "converted")
    tokens = Tokens.load(files.folder, use_fast=True)
    assert tokens.chat_templates == ("default", "tool_use")
    said = [{"role": "user", "content": "The sky"}]
    for name, template in (("default", CHAT_TEMPLATE), ("tool_use", TOOLS)):
        wanted = usual.apply_chat_template(said, chat_template=template, add_generation_prompt=True, return_dict=False)
        assert tokens.encode("The sky", name) == wanted
    assert tokens.encode("The sky", True) == tokens.encode("The sky", "default") != tokens.encode("The sky", "tool_use")
    changed = next(files.folder.glob("additional_chat_templates/*"))
    changed.write_text("changed")
    with pytest.raises(ModelError, match=r"additional_chat_templates/tool_use\.jinja has"):
        open_folder(files.folder, "again")


@pytest.mark.parametrize(
    ("templates", "wanted", "says"),
    [
        ({"default": "a", "rag": "b"}, "tool_use", "default, rag"),
        ({"rag": "b", "tool_use": "c"}, True, "rag, tool_use"),
        ("a", "tool_use", "one of the model's chat templates: default"),
        (None, "tool_use", "has no chat template"),
    ],
)
def test_a_template_that_is_not_there_is_answered_with_those_that_are(
    templates: str | dict[str, str] | None, wanted: bool | str, says: str
) -> None:
    tokens = tokens_with(templates)
    with pytest.raises(InputError, match=says) as caught:
        tokens.encode("The sky", wanted)
    assert caught.value.field == "generation.chat"
    with pytest.raises(InputError, match=says):
        tokens.check_chat(wanted, "model")


@pytest.mark.parametrize("chat", ["", 5, None, ["rag"]])
def test_a_setting_that_is_no_name_is_refused(chat: object) -> None:
    with pytest.raises(InputError, match="name of one of the model's chat templates") as caught:
        config.parse({"generation": {"chat": chat}})
    assert caught.value.field == "generation.chat"
    assert config.parse({"generation": {"chat": "rag"}}).generation.chat == "rag"


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_makes_no_text_is_named_when_the_model_is_chosen(name: str, hurry: None) -> None:
    template, says = BROKEN[name]
    tokens = tokens_with({"default": CHAT_TEMPLATE, "mine": template})
    with pytest.raises(ModelError) as caught:
        tokens.check_chat("mine", "the model")
    said = str(caught.value)
    assert said.startswith("The chat template 'mine' of the model cannot be used: it ")
    assert says in said
    assert "--raw" in said and "or one of the others: default" in said
    assert "\n" not in said
    tokens.check_chat(True, "the model")
    tokens.check_chat(False, "the model")


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_makes_no_text_of_a_prompt_refuses_the_prompt(name: str, hurry: None) -> None:
    template, says = BROKEN[name]
    tokens = tokens_with(
        f"{{% if 'sky' in messages[0]['content'] %}}{template}{{% else %}}{{{{ messages[0]['content'] }}}}{{% endif %}}"
    )
    if name not in ("syntax", "unclosed", "powers"):  # which show in any prompt
        tokens.check_chat(True, "the model")
    with pytest.raises(InputError) as caught:
        tokens.encode("The sky", True)
    assert caught.value.field == "prompt"
    assert says.replace("line 2", "line") in str(caught.value).replace("line 2", "line")
    assert tokens.encode("The sky", False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for part in messages[0]['content'] %}<|user|>{{ part['text'] }}{% endfor %}<|assistant|>",
        "<|user|>{{ messages[0].content[0].text }}<|assistant|>",
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<|assistant|>",
        "\u200b",
    ],
)
def test_a_template_that_leaves_the_prompt_out_is_named_when_the_model_is_chosen(template: str) -> None:
    with pytest.raises(ModelError, match="'default' of tiny cannot be used: it leaves the prompt's text out"):
        tokens_with(template).check_chat(True, "tiny")


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_that_is_no_unicode_text_is_refused(chat: bool) -> None:
    with pytest.raises(InputError, match="text that UTF-8 can hold"):
        tokens_with(CHAT_TEMPLATE).encode(b"caf\xe9".decode(errors="surrogateescape"), chat)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")  # a space without width
    with pytest.raises(InputError, match="at least one token"):
        Tokens(tokenizer, frozenset()).encode("\u200b", False)


def test_a_token_without_an_embedding_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = converted(checkpoint, tmp_path / "converted").folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(folder)
    tokens = Tokens.load(folder, use_fast=True)
    assert tokens.encode("The sky", True)
    with pytest.raises(InputError, match=r"text without the token '<\|extra\|>': its id is 400, and the model has 400"):
        tokens.encode("The <|extra|> sky", True)


def test_arguments_may_be_handed_on_with_two_stars() -> None:
    template = "{{ dict( **{'a': messages[0]['content']})['a'] }}{{ dict(b=1, **{'c': 2})['c'] }}"
    tokens = tokens_with(template)
    assert tokens.encode("The sky", True) == tokens.encode("The sky2", False)


def test_a_long_prompt_is_no_long_template() -> None:
    tokens = tokens_with("{{ messages[0]['content'] }}" * 2)
    prompt = "The sky is blue. " * 100_000
    said = [Message("user", prompt)]
    assert chat_template.render(tokens._tokenizer, "{{ messages[0]['content'] }}" * 2, said) == prompt * 2


def test_one_process_renders_all_prompts() -> None:
    tokens = tokens_with(CHAT_TEMPLATE)
    tokens.encode("The sky", chat=True)
    rendering = set(psutil.Process().children())
    for number in range(20):
        tokens.encode(f"The sky {number}", chat=True)
    assert set(psutil.Process().children()) == rendering


def test_prompts_are_rendered_while_templates_compute_without_end(hurry: None) -> None:
    tokenizer, usual = make_tokenizer(), tokens_with(CHAT_TEMPLATE).encode("The sky", chat=True)
    bad = ["endless", "products", "huge"]

    def refusal(name: str) -> str:
        with pytest.raises(TemplateFailed) as caught:
            chat_template.render(tokenizer, BROKEN[name][0], [Message("user", "The sky")])
        return str(caught.value)

    with ThreadPoolExecutor(len(bad)) as threads:
        ends, count = [threads.submit(refusal, name) for name in bad], 0
        while not all(end.done() for end in ends):
            assert tokens_with(CHAT_TEMPLATE).encode("The sky", chat=True) == usual
            count += 1
    assert count > 1
    assert all(BROKEN[name][1] in end.result() for name, end in zip(bad, ends, strict=True))


def test_control_tokens_in_a_prompt_are_control_tokens_and_are_shown() -> None:
    tokens = tokens_with(CHAT_TEMPLATE)
    text = "Hi<|end|><|assistant|>Ü🙂"
    said = [{"role": "user", "content": text}]
    wanted = tokens._tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    ids = tokens.encode(text, True)
    assert ids == wanted  # as transformers does it
    pieces = tokens.pieces(ids)
    assert [text for text, control in pieces if control] == [
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert [text for text, control in pieces if not control] == ["Hi", "Ü🙂"]


def test_a_conversation_is_rendered_as_transformers_renders_it() -> None:
    tokens = tokens_with(CHAT_TEMPLATE)
    said = (Message("user", "Why?"), Message("assistant", "Because."), Message("user", "Really?"))
    listed = [{"role": message.role, "content": message.content} for message in said]
    wanted = tokens._tokenizer.apply_chat_template(listed, add_generation_prompt=True, return_dict=False)
    assert tokens.encode(said, True) == wanted


def test_values_in_json_are_those_that_transformers_renders() -> None:
    tokenizer = make_tokenizer()
    template = "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ [true, none, 1.5, 'ü'] | tojson }}"
    tool = Tool("look_up", "Say <what> is there.", '{"type": "object", "properties": {"at": {"enum": [1, 2.5, null]}}}')
    found = chat_template.render(tokenizer, template, [Message("user", "Größe")], [tool])
    said, functions = [{"role": "user", "content": "Größe"}], [chat_template.as_function(tool)]
    assert found == tokenizer.apply_chat_template(said, functions, chat_template=template, tokenize=False)


def test_messages_need_a_template() -> None:
    said = (Message("user", "Why?"),)
    with pytest.raises(InputError, match="no chat template for messages"):
        tokens_with(None).encode(said, True)
    with pytest.raises(InputError, match="chat: False"):
        GenerationRequest(said, chat=False)


def test_token_ids_are_themselves_and_must_be_the_models(checkpoint: Path, tmp_path: Path) -> None:
    tokens = Tokens.load(converted(checkpoint, tmp_path / "converted").folder, use_fast=True)
    assert tokens.encode((5, 7, 5), True) == [5, 7, 5]
    for wrong in (400, -1):
        with pytest.raises(InputError, match="token ids from 0 to 399"):
            tokens.encode((5, wrong), True)


@pytest.mark.parametrize("name", ["nothing", "raises", "syntax"])
def test_runs_do_not_begin_with_a_template_that_makes_no_text(
    checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = converted(checkpoint, tmp_path / "converted")
    (files.folder / "chat_template.jinja").write_text(BROKEN[name][0])
    seal(files.folder, "test", files.facts, silent)
    model = {"name": str(files.folder)}
    with pytest.raises(ModelError, match="The chat template 'default' of"):
        Runs(config.parse({"model": model}), silent).read_model()
    with Runs(config.parse({"model": model, "generation": {"chat": False}}), silent) as runs:
        assert runs.model.capabilities.chat_templates == ("default",)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    assert command_line.main(["compare", "--config", "config.yaml"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: The chat template 'default' of")
    assert said.out == ""


def test_the_command_line_names_the_templates_that_there_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = converted(checkpoint, tmp_path / "converted")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"name": str(files.folder)}}))
    assert command_line.main(["compare", "--config", "config.yaml", "--chat-template", "rag"]) == 2
    assert "generation.chat: 'rag' cannot be used; expected one of the model's chat templates: default" in (
        capsys.readouterr().err
    )
    assert command_line.main(["compare", "--chat-template", "rag", "--raw"]) == 2
    assert "either --chat-template or --raw" in capsys.readouterr().err
