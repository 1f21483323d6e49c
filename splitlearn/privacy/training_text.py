"""Text that attacks learn from: what every Python has, the topics of its help(), and random tokens. Never the victim's.

The topics are English prose about code. Random tokens show the rest of the vocabulary, such as that of other languages.
"""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from splitlearn.errors import InputError

COMMON_WORDS = 8
"""A prompt with so many words in a row from the text has been seen in training."""


@cache
def training_text() -> str:
    """The topics, in the order of their names. Raises InputError if this Python lacks them."""
    try:
        from pydoc_data import topics  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        expected = "attacks without training text: this Python lacks its module pydoc_data, of which linear learns"
        raise InputError("attacks", "linear, search", expected) from error
    return "\n".join(text for _, text in sorted(topics.topics.items()))


def check_disjoint(prompts: Sequence[str]) -> None:
    """Raise InputError for a prompt that the training text has a part of."""
    known = set(_runs(training_text()))
    for number, prompt in enumerate(prompts, 1):
        if not known.isdisjoint(_runs(prompt)):
            expected = f"text that attacks have not learnt from: {COMMON_WORDS} words of it are in Python's help()"
            raise InputError(f"prompts, number {number}", prompt[:80], expected)


def windows(ids: Sequence[int], vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    """Token ids [count, length]: half of the rows from random places of the text's `ids`, half random tokens."""
    source, made = torch.tensor(ids), torch.Generator().manual_seed(seed)
    length = min(length, len(source))
    of_text = count // 2
    starts = torch.randint(len(source) - length + 1, (of_text, 1), generator=made)
    text = source[starts + torch.arange(length)]
    return torch.cat([text, torch.randint(vocabulary, (count - of_text, length), generator=made)])


def _runs(text: str) -> list[tuple[str, ...]]:
    """All COMMON_WORDS words in a row."""
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[at : at + COMMON_WORDS]) for at in range(len(words) - COMMON_WORDS + 1)]
