"""Encodes text to token ids and decodes them: a model's own tokenizer and its chat template."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.chat_template import TemplateFailed
from splitlearn.checkpoints.folder import CONFIG, PYTHON_VOCABULARY
from splitlearn.errors import InputError, ModelError
from splitlearn.events import GenerationRequest, Message, Prompt, messages_of, texts_of, token_ids_of
from splitlearn.generation.detokenizer import Detokenizer
from splitlearn.generation.tool_calls import CallReader, CallSyntax, syntax_of
from splitlearn.runtime import private_apis
from splitlearn.tools import Tool


class Tokens:
    """The tokenizer of a converted folder. Ids are those of the model's vocabulary."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int], embeddings: int | None = None) -> None:
        self._tokenizer = tokenizer
        # Without clean-up transformers' own decode() does the same, and takes twice as long.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._embeddings = embeddings  # of the model, which may have fewer than the tokenizer has tokens
        self._templates = chat_template.templates(tokenizer.chat_template)
        self._syntaxes: dict[str, CallSyntax] = {}
        self.eos_ids = eos_ids
        """The ids that end an answer."""

    @classmethod
    def load(cls, folder: Path, use_fast: bool) -> "Tokens":
        """Read the tokenizer in `folder`. Without `use_fast` it is the Python one if `python_tokenizer_available`, else
        the model's only one. Raises ModelError if it cannot be read."""
        tokenizer = _read(folder)
        if not use_fast and _why_no_python(folder, tokenizer) is None:
            python = private_apis.python_tokenizer_class(tokenizer)
            tokenizer = python.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        try:
            return cls(tokenizer, _eos_ids(folder, tokenizer), _embeddings(folder))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"The settings beside the tokenizer in {folder} cannot be read: {error}") from error

    @property
    def size(self) -> int:
        """The size of the vocabulary, including added tokens. Logits may have more entries, as padding."""
        return len(self._tokenizer)

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def serialized(self) -> str | None:
        """The tokenizer as the tokenizers library writes it, in JSON. None for one in Python."""
        return None if self._backend is None else str(self._backend.to_str())

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The names of the model's chat templates. A single one is called `default`."""
        return tuple(sorted(self._templates))

    def check_chat(self, chat: bool | str, model: str) -> None:
        """Try the template that `encode` applies for `chat` on short prompts. `model` is the model's name in errors.

        Raises InputError for a template that the model does not have, ModelError for one that gives no text or leaves
        out the prompt.
        """
        chosen = chat_template.choose(self._templates, chat)
        if chosen is None:
            return
        name, template = chosen
        try:
            chat_template.check(self._tokenizer, template)
        except TemplateFailed as error:
            others = [other for other in self.chat_templates if other != name]
            also = f", or one of the others: {', '.join(others)}" if others else ""
            reason = f"The chat template {name!r} of {model} cannot be used: it {error}."
            raise ModelError(f"{reason} {chat_template.INSTEAD}{also}.") from error

    def encode(self, prompt: Prompt, chat: bool | str, tools: Sequence[Tool] = ()) -> list[int]:
        """The ids of `prompt`. With `chat` they are those of its messages, or of the text as the only message of a
        conversation, if the model has a template, which also tells it of `tools`. Token ids are taken as they are.

        True is the default template; a name chooses one of several. Control tokens that are spelled out in the prompt
        become control tokens. Raises InputError for a prompt without text or tokens, with incomplete characters, or
        that the template rejects. It is also raised for messages without a template, a template that the model does not
        have, tools that its template has no place for, and an id that is not a token of the model.
        """
        texts, given = texts_of(prompt), token_ids_of(prompt)
        if not (given or any(text.strip() for text in texts)):
            raise InputError("prompt", prompt, "some text")
        text = "\n".join(texts)
        if any("\ud800" <= each <= "\udfff" for each in text):  # from a command line with invalid UTF-8
            raise InputError("prompt", chat_template.excerpt(text), "text that UTF-8 can hold")
        ids = list(given) or self._encode(prompt, text, chat, tools)
        if not ids:
            raise InputError(
                "prompt", chat_template.excerpt(text), "text that the tokenizer encodes to at least one token"
            )
        self._check_known(ids, text)
        return ids

    def _encode(self, prompt: Prompt, text: str, chat: bool | str, tools: Sequence[Tool]) -> list[int]:
        chosen, messages = chat_template.choose(self._templates, chat), messages_of(prompt)
        if chosen is None and messages:
            raise InputError("prompt", chat_template.excerpt(text), "text: the model has no chat template for messages")
        if chosen is None:
            return list(self._tokenizer.encode(text))
        if tools or any(message.tool_calls for message in messages):
            self.call_syntax(chat)
        rendered = self._render(*chosen, messages or (Message("user", text),), tools)
        return list(self._tokenizer.encode(rendered, add_special_tokens=False))

    def call_syntax(self, chat: bool | str) -> CallSyntax:
        """How the model writes tool calls. Raises InputError if it has no such template, or one without tools."""
        name, template = chat_template.choose(self._templates, chat) or ("", "")
        if name not in self._syntaxes:
            try:
                self._syntaxes[name] = syntax_of(self._tokenizer, template)
            except TemplateFailed as error:
                raise InputError("tools", name, f"a model with tools; the chat template of this one {error}") from error
        return self._syntaxes[name]

    def _check_known(self, ids: Sequence[int], text: str) -> None:
        """Raise InputError for an id that the model has no embedding for."""
        unknown = max(ids)
        if self._embeddings is None or (unknown < self._embeddings and min(ids) >= 0):
            return
        if not text:
            raise InputError("prompt", unknown, f"token ids from 0 to {self._embeddings - 1}")
        token = self._tokenizer.convert_ids_to_tokens(unknown)
        expected = f"text without the token {token!r}: its id is {unknown}, and the model has {self._embeddings}"
        raise InputError("prompt", chat_template.excerpt(text), expected)

    def _render(self, name: str, template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        try:
            return chat_template.render(self._tokenizer, template, messages, tools)
        except TemplateFailed as error:
            expected = f"a prompt that the chat template {name!r} takes; it {error}. {chat_template.INSTEAD}"
            raise InputError("prompt", chat_template.excerpt(messages[-1].content), expected) from error

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of `ids` in pieces, each with whether it is a control token. Text between those is one piece."""
        control = self._tokenizer.added_tokens_decoder
        found: list[tuple[str, bool]] = []
        for is_control, group in groupby(ids, key=control.__contains__):
            listed = list(group)
            parts = [[token] for token in listed] if is_control else [listed]
            found += [(self._tokenizer.decode(part, clean_up_tokenization_spaces=False), is_control) for part in parts]
        return found

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of `ids` with special tokens."""
        return "".join(text for text, _ in self.pieces(ids))

    def each(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of each of `ids` alone, with whether it is a control token."""
        alone = {token: self.pieces([token])[0] for token in set(ids)}
        return [alone[token] for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def detokenizer(self, marks: Mapping[int, str] | None = None) -> Detokenizer:
        """A new incremental decoder for one answer. The special tokens in `marks` have a text in it."""
        return Detokenizer(self.decode, {**dict.fromkeys(self._tokenizer.all_special_ids, ""), **(marks or {})})

    def readers(self, request: GenerationRequest, prompt: Sequence[int]) -> tuple[Detokenizer, CallReader | None]:
        """What makes text of a new answer to the ids `prompt`, and what finds tool calls in it if there are tools."""
        if not request.tools:
            return self.detokenizer(), None
        syntax = self.call_syntax(request.chat)
        calls = syntax.reader(self.text_of(prompt), request.tools, request.parallel_tool_calls)
        return self.detokenizer(syntax.marks), calls


def python_tokenizer_available(folder: Path) -> str | None:
    """Why the model in `folder` has only one of the Rust and Python tokenizers, or None if it has both.

    transformers 5 ignores `use_fast` and has one class for each tokenizer, mostly the Rust one. The exception is
    BertTokenizer (some GPT-2 models have it), whose Python class still exists as BertTokenizerLegacy. It gives the same
    ids, but text with a space before punctuation.
    """
    return _why_no_python(folder, _read(folder))


def _why_no_python(folder: Path, tokenizer: Any) -> str | None:
    from transformers import TokenizersBackend, __version__

    name = type(tokenizer).__name__
    if not isinstance(tokenizer, TokenizersBackend):
        return f"transformers {__version__} has only a Python tokenizer for this model ({name})"
    if private_apis.python_tokenizer_class(tokenizer) is None:
        return f"transformers {__version__} has only a Rust tokenizer for this model ({name})"
    if not (folder / PYTHON_VOCABULARY).exists():
        return f"the Python tokenizer needs {PYTHON_VOCABULARY}, which this model does not have"
    return None


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise errors of any class for unusual files
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs Python code of its own (auto_map), and no code of a model is run here"
        raise ModelError(f"The tokenizer in {folder} cannot be read: {reason[:500]}") from error


def _eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The end tokens that generation_config.json names, and the tokenizer's own."""
    path = folder / "generation_config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    ids = value if isinstance(value, list) else [value]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _embeddings(folder: Path) -> int | None:
    """The number of the model's embeddings, or None if its configuration does not state it."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    count = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return count if isinstance(count, int) else None
