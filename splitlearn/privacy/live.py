"""One prompt, attacked in a process of its own; each attack is reported as it ends.

    for item in read(question, stop): ...      # a Victim, a Reading for each attack, a Guess, and Steps between

Records alone, so that the page's process needs no torch; attacked.py computes.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.scores import Hits
from splitlearn.runtime import process
from splitlearn.runtime.progress import Step

LIVE = ("linear", "answer", "search")
"""The attacks. The last one learns for a minute or more behind many layers; others always do, or recover less."""
MOST_TOKENS = 256
"""Of a prompt."""
WHAT = "The process of the attacks"


@dataclass(frozen=True)
class Question:
    """What to attack: a prompt, at the cut of `plan`, of a client with a `defence` (defences.py) that attacks know. The
    folder `kept` has what they have learnt of a cut."""

    files: ModelFiles
    dtype: str
    plan: SplitPlan
    defence: str
    prompt: str
    threads: int | None
    kept: Path


@dataclass(frozen=True)
class Victim:
    """The session that is attacked. The server has the lengths, in tokens, and not the text of the greedy answer.
    `bytes_per_token` is what it gets for each, and sends back."""

    prompt_tokens: int
    answer_tokens: int
    answer: str
    bytes_per_token: int


@dataclass(frozen=True)
class Said:
    """The text that an attack says for a token, beside the `truth`. `right`: it has the right id. Tokens that are parts
    of one character are one of these."""

    text: str
    truth: str
    right: bool


@dataclass(frozen=True)
class Reading:
    """What an attack recovered. A part that it does not look at has nothing said and no hits. `seconds` is its time,
    without `prepare_s`, what it learns once for a cut."""

    attack: str
    prompt_said: tuple[Said, ...]
    answer_said: tuple[Said, ...]
    prompt: Hits
    answer: Hits
    seconds: float
    prepare_s: float

    @property
    def seconds_per_token(self) -> float:
        """Of the tokens that the attack looks at."""
        return self.seconds / max(1, self.prompt.tokens + self.answer.tokens)


@dataclass(frozen=True)
class Guess:
    """How many of the prompt's tokens a language model guesses without any hidden state, told those before each."""

    hits: Hits


Item = Step | Victim | Reading | Guess


def read(question: Question, stop: threading.Event) -> Iterator[Item]:
    """Attack it. Closing the iterator, or setting `stop`, ends that. Raises InputError for a prompt that cannot be
    attacked, and what loading the model raises."""
    yield from process.stream(WHAT, "splitlearn.privacy.attacked:attack", stop, question)
