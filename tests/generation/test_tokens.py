"""Text to ids and back."""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from splitlearn.checkpoints import convert
from splitlearn.checkpoints.folder import ModelFiles, seal
from splitlearn.errors import InputError, ModelError
from splitlearn.generation.tokenizer import Tokens, python_tokenizer_available
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.tiny import make_checkpoint

TEXT = "Größe, façade, naïve, 日本語, русский, emoji 🙂🚀👩‍👩‍👧 and e\u0301 combined, 한국어 🦊. "


@pytest.fixture(scope="module")
def tokens(tiny_model: TinyFactory) -> Tokens:
    return Tokens.load(tiny_model().folder, use_fast=True)


def streamed(tokens: Tokens, ids: list[int]) -> list[str]:
    """The pieces in which the text of `ids` comes, the rest at the end last."""
    text = tokens.detokenizer()
    return [*(text.feed(token) for token in ids), text.flush()]


def test_pieces_together_are_the_whole_text(tokens: Tokens) -> None:
    ids = tokens.encode(TEXT * 10, chat=False)
    assert "".join(streamed(tokens, ids)) == tokens.decode(ids) == TEXT * 10


def test_multi_byte_characters_come_whole(tokens: Tokens) -> None:
    ids = tokens.encode(TEXT, chat=False)
    assert len(tokens.encode("🦊", chat=False)) > 1  # so that characters are spread over tokens
    assert not any("\ufffd" in piece for piece in streamed(tokens, ids))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_ids_are_the_whole_text(tokens: Tokens, seed: int) -> None:
    draw = random.Random(seed)
    top = tokens.size if seed % 2 else 259  # the first are bytes and special tokens: mostly no valid text
    ids = [draw.randrange(top) for _ in range(draw.choice([1, 7, 40, 300]))]
    assert "".join(streamed(tokens, ids)) == tokens.decode(ids)


def test_an_unfinished_character_is_given_at_the_end(tokens: Tokens) -> None:
    ids = tokens.encode("한", chat=False)[:2]
    assert streamed(tokens, ids) == ["", "", "\ufffd"]


def test_a_token_costs_the_same_late_as_early(tokens: Tokens) -> None:
    part = tokens.encode("한", chat=False)[:1]  # never valid text: what is held back must not grow
    text = tokens.detokenizer()

    def seconds() -> float:
        start = time.perf_counter()
        for token in part * 500:
            text.feed(token)
        return time.perf_counter() - start

    early = min(seconds() for _ in range(3))
    for token in part * 5000:
        text.feed(token)
    assert min(seconds() for _ in range(3)) < 3 * early


def test_special_tokens_are_no_text(tokens: Tokens) -> None:
    (end,) = tokens.eos_ids
    ids = tokens.encode("The sky", chat=False)
    assert "".join(streamed(tokens, [*ids, end, *ids])) == "The skyThe sky"


def test_chat_applies_the_template(tokens: Tokens) -> None:
    raw, chat = tokens.encode("The sky", chat=False), tokens.encode("The sky", chat=True)
    assert tokens.chat_templates
    assert chat[1 : 1 + len(raw)] == raw
    assert len(chat) == len(raw) + 3  # user, end, assistant


def test_chat_without_a_template_is_the_raw_prompt(tiny_model: TinyFactory) -> None:
    tokens = Tokens.load(tiny_model(chat=False).folder, use_fast=True)
    assert not tokens.chat_templates
    assert tokens.encode("The sky", chat=True) == tokens.encode("The sky", chat=False)


@pytest.mark.parametrize("prompt", ["", "  \n"])
@pytest.mark.parametrize("chat", [True, False])
def test_an_empty_prompt_is_refused(tokens: Tokens, prompt: str, chat: bool) -> None:
    with pytest.raises(InputError, match="prompt"):
        tokens.encode(prompt, chat)


def test_end_ids_are_those_of_model_and_tokenizer(tmp_path: Path, tiny_model: TinyFactory) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model().folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    own = Tokens.load(tiny_model().folder, use_fast=True).eos_ids
    assert Tokens.load(folder, use_fast=True).eos_ids == own | {7, 9}


def test_a_tokenizer_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        Tokens.load(tmp_path, use_fast=True)


def test_a_model_with_a_rust_tokenizer_alone_says_so(tiny_model: TinyFactory) -> None:
    reason = python_tokenizer_available(tiny_model().folder)
    assert reason is not None
    assert "only a Rust tokenizer" in reason


def test_a_model_with_both_tokenizers_gives_the_same_ids_with_each(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sky", "is", "blue", "##s", "."]
    (checkpoint / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(checkpoint).save_pretrained(checkpoint)
    folder = tmp_path / "model"
    folder.mkdir()
    seal(folder, "test", convert.convert(checkpoint, folder, None, silent), silent)
    assert python_tokenizer_available(folder) is None
    rust, python = Tokens.load(folder, use_fast=True), Tokens.load(folder, use_fast=False)
    assert type(rust._tokenizer) is not type(python._tokenizer)
    ids = rust.encode("The skys is blue.", chat=False)
    assert python.encode("The skys is blue.", chat=False) == ids
    assert "".join(streamed(rust, ids)) == rust.decode(ids) == "the skys is blue."
    assert "".join(streamed(python, ids)) == python.decode(ids) == "the skys is blue ."


@pytest.mark.weights
def test_the_default_model_has_its_chat_format(default_model: ModelFiles) -> None:
    tokens = Tokens.load(default_model.folder, use_fast=True)
    ids = tokens.encode("Hello", chat=True)
    raw = tokens._tokenizer.decode(ids)
    assert raw.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokens.eos_ids == {tokens._tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert tokens.size == default_model.facts.vocab_size
    assert "only a Rust tokenizer" in (python_tokenizer_available(default_model.folder) or "")


@given(data=st.data())
def test_pieces_of_arbitrary_ids_are_the_whole_text(tokens: Tokens, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokens.size - 1), max_size=80))
    pieces = tokens.detokenizer()
    assert "".join([*map(pieces.feed, ids), pieces.flush()]) == tokens.decode(ids)
