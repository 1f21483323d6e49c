"""Text to token ids and back: a model's own tokenizer, its chat template, and text that comes out as it is decoded."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.chat_template import TemplateFailed
from splitlearn.checkpoints.folder import CONFIG, PYTHON_VOCABULARY
from splitlearn.errors import InputError, ModelError
from splitlearn.runtime import private_apis

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so no more than three replacement characters at the end can still become
# one; a byte is at most one token.
_UNFINISHED = 3
# Ids that are decoded again with each new one: enough that the text at the window's end does not depend on its start.
_WINDOW = 16


class Tokens:
    """The tokenizer of a converted folder. Ids are those of the model's vocabulary."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int], embeddings: int | None = None) -> None:
        self._tokenizer = tokenizer
        # transformers' own decode() does nothing more for text that is not cleaned up, and takes twice as long.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._embeddings = embeddings  # of the model, which may have fewer than the tokenizer has tokens
        self._templates = chat_template.templates(tokenizer.chat_template)
        self.eos_ids = eos_ids
        """The ids that end an answer."""

    @classmethod
    def load(cls, folder: Path, use_fast: bool) -> "Tokens":
        """Read the tokenizer in `folder`; without `use_fast` the Python one, where `python_tokenizer_available`.

        Without `use_fast` and where it is not available, the model's only tokenizer is what there is. Raises ModelError
        when it cannot be read.
        """
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
        """Tokens of the vocabulary, added ones included; the logits may have more entries, as padding."""
        return len(self._tokenizer)

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The names of the model's chat templates: of the only one, `default`."""
        return tuple(sorted(self._templates))

    def check_chat(self, chat: bool | str, model: str) -> None:
        """Try what `encode` would apply for `chat`, on short prompts. `model` is what the model is called.

        Raises InputError for a template that the model does not have, ModelError for one that makes no text or leaves
        the prompt out.
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
            said = f"The chat template {name!r} of {model} cannot be used: it {error}."
            raise ModelError(f"{said} {chat_template.INSTEAD}{also}.") from error

    def encode(self, prompt: str, chat: bool | str) -> list[int]:
        """The ids of `prompt`; with `chat` as the one message of a conversation, where the model has a template for it.

        True is the default template; a name chooses one of several. Control tokens that are spelled out in the prompt
        are control tokens. Raises InputError for a prompt of no text or no tokens, or of half characters, for one that
        the template makes nothing of, and for a template that the model does not have.
        """
        if not prompt.strip():
            raise InputError("prompt", prompt, "some text")
        if any("\ud800" <= each <= "\udfff" for each in prompt):  # of bytes on a command line that are no UTF-8
            raise InputError("prompt", chat_template.excerpt(prompt), "text that UTF-8 can hold")
        chosen = chat_template.choose(self._templates, chat)
        if chosen is None:
            ids = self._tokenizer.encode(prompt)
        else:
            ids = self._tokenizer.encode(self._render(*chosen, prompt), add_special_tokens=False)
        if not ids:
            raise InputError(
                "prompt", chat_template.excerpt(prompt), "text of which the tokenizer makes a token or more"
            )
        unknown = max(ids)
        if self._embeddings is not None and unknown >= self._embeddings:
            token = self._tokenizer.convert_ids_to_tokens(unknown)
            wanted = f"text without the token {token!r}: its id is {unknown}, and the model has {self._embeddings}"
            raise InputError("prompt", chat_template.excerpt(prompt), wanted)
        return list(ids)

    def _render(self, name: str, template: str, prompt: str) -> str:
        try:
            return chat_template.render(self._tokenizer, template, prompt)
        except TemplateFailed as error:
            wanted = f"a prompt that the chat template {name!r} takes; it {error}. {chat_template.INSTEAD}"
            raise InputError("prompt", chat_template.excerpt(prompt), wanted) from error

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of `ids` as the model sees it, in pieces: each control token alone (True), and what is between."""
        control = self._tokenizer.added_tokens_decoder
        found: list[tuple[str, bool]] = []
        for is_control, group in groupby(ids, key=control.__contains__):
            listed = list(group)
            parts = [[token] for token in listed] if is_control else [listed]
            found += [(self._tokenizer.decode(part, clean_up_tokenization_spaces=False), is_control) for part in parts]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def detokenizer(self) -> "Detokenizer":
        """A fresh incremental decoder for one answer."""
        return Detokenizer(self, frozenset(self._tokenizer.all_special_ids))


class Detokenizer:
    """Gives the text of one answer while its ids come in; its pieces together are `Tokens.decode` of all ids.

    Each id costs the decoding of at most 32. A character comes when all of its bytes are there, so a replacement
    character is text of the model's own, held back until nothing can complete it. (tokenizers' DecodeStream holds back
    all text, and decodes all of it again, for as long as it ends in one, and cannot be asked for the rest at the end.)

    One difference is left: where a tokenizer spells bytes as tokens of their own (SentencePiece's byte fallback), a
    whole character that is followed by a stray byte is decoded in retrospect to replacement characters.
    """

    def __init__(self, tokens: Tokens, special: frozenset[int]) -> None:
        self._tokens = tokens
        self._special = special
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out, or that stand before its first id's

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty for a special token or an unfinished character."""
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._tokens.decode(self._window)
        unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
        piece = text[self._given : len(text) - min(unfinished, _UNFINISHED)]
        self._given += len(piece)
        if len(self._window) > 2 * _WINDOW:
            self._shrink(len(text) - self._given)
        return piece

    def flush(self) -> str:
        """The rest: what was held back as an unfinished character."""
        return self._tokens.decode(self._window)[self._given :]

    def _shrink(self, held_back: int) -> None:
        """Forget the older ids; what is held back stays at the end of the text."""
        self._window = self._window[-_WINDOW:]
        self._given = len(self._tokens.decode(self._window)) - held_back


def python_tokenizer_available(folder: Path) -> str | None:
    """Why the model in `folder` leaves no choice between a Rust and a Python tokenizer; None when it has both.

    transformers 5 ignores `use_fast` and has one class for each tokenizer, most often the Rust one. The exception is
    BertTokenizer (some GPT-2 models have it), beside which its Python class was kept as BertTokenizerLegacy: it gives
    the same ids, and text with a space before punctuation.
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
    except Exception as error:  # transformers and tokenizers raise what they like for files from anywhere
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            said = "it needs Python code of its own (auto_map), and no code of a model is run here"
        raise ModelError(f"The tokenizer in {folder} cannot be read: {said[:500]}") from error


def _eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The end tokens that generation_config.json names, and the tokenizer's own."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _embeddings(folder: Path) -> int | None:
    """How many tokens the model has embeddings for, where its configuration says so."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    count = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return count if isinstance(count, int) else None
