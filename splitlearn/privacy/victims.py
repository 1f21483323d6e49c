"""The prompts that are attacked when a person gives none: four kinds of text, written for this, of 5 to 100 tokens."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

ANSWER_TOKENS = 8
"""Of the answers that are attacked beside the prompts."""
OWN = "own"
"""The kind of a person's own prompts."""


@dataclass(frozen=True)
class Victim:
    """A prompt and the kind of its text."""

    kind: str
    prompt: str


@cache
def built_in() -> tuple[Victim, ...]:
    """The kinds take turns, so that the first few have all of them."""
    kinds = tomllib.loads(Path(__file__).with_name("victims.toml").read_text(encoding="utf-8"))
    listed = [[Victim(kind, prompt) for prompt in own["prompts"]] for kind, own in kinds.items()]
    return tuple(each for each in chain.from_iterable(zip_longest(*listed)) if each is not None)


def own(prompts: Sequence[str]) -> tuple[Victim, ...]:
    """A person's own prompts."""
    return tuple(Victim(OWN, prompt) for prompt in prompts)
