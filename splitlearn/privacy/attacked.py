"""The child processes behind live.py and sweep_job.py: they compute, and say how far they are."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.privacy import victims
from splitlearn.privacy.baselines import Baselines
from splitlearn.privacy.live import LIVE, MOST_TOKENS, Guess, Item, Question, Reading, Said, Victim
from splitlearn.privacy.opponents import Attacker, Opponents
from splitlearn.privacy.registry import ATTACKS, Attack, Recovered
from splitlearn.privacy.results import Results
from splitlearn.privacy.scores import Hits, score
from splitlearn.privacy.split_model import VictimSession
from splitlearn.privacy.sweep import Sweep
from splitlearn.privacy.sweep_job import SweepRequest
from splitlearn.privacy.training_text import check_disjoint
from splitlearn.runtime.progress import Step
from splitlearn.stages.loading import prepare_process

NICE = 19
PART, MOST_PARTS = "\ufffd", 4
"""What a part of a character decodes to, and the most bytes of one."""


def attack(say: Callable[[Item], None], asked: Question) -> None:
    """Answer the prompt, then say what each attack recovers of it. Raises InputError for a prompt that is too long, or
    that attacks have learnt from."""
    check_disjoint([asked.prompt])
    prepare_process((), asked.threads)
    say(Step("Loading the model"))
    tokens = Tokens.load(asked.files.folder, use_fast=True)
    ids = tokens.encode(asked.prompt, chat=False)
    if len(ids) > MOST_TOKENS:
        raise InputError("prompt", f"{len(ids)} tokens", f"at most {MOST_TOKENS}")
    opponents = Opponents(asked.files, asked.plan, asked.dtype, victims.ANSWER_TOKENS, kept=asked.kept)
    say(Step("Answering the prompt"))
    session = opponents.session(asked.defence, asked.prompt)
    answer, size = session.answer_ids, session.capture.rows.row_bytes(session.capture.sent.shape[1])
    say(Victim(len(ids), len(answer), tokens.text_of(answer), size))
    attacker = opponents.knowing(asked.defence)
    for name in LIVE:
        say(Step(f"Learning for {name}"))
        attacker.prepare(ATTACKS[name])
        say(Step(f"Attacking with {name}"))
        say(_reading(ATTACKS[name], session, attacker, tokens))
    say(Step("Guessing without hidden states"))
    say(Guess(Hits(Baselines(asked.files, asked.dtype).right("guess", ids), len(ids))))


def _reading(attack: Attack, session: VictimSession, attacker: Attacker, tokens: Tokens) -> Reading:
    """Run an attack, which gets the capture and the checkpoint alone."""
    prepare_s, began = attacker.prepare(attack), time.perf_counter()
    recovered = attacker.run(attack, session.capture)
    seconds = time.perf_counter() - began
    n = len(session.prompt_ids)
    said = (_said(recovered[:n], session.prompt_ids, tokens), _said(recovered[n:], session.answer_ids, tokens))
    return Reading(attack.name, *said, *score(session, recovered, attack.reads), seconds, prepare_s)


def _said(recovered: Recovered, truth: Sequence[int], tokens: Tokens) -> tuple[Said, ...]:
    """The texts of what was recovered, as few tokens at a time as make whole characters."""
    found, open_ = list[Said](), list[tuple[int, int]]()
    for pair in zip(recovered, truth, strict=False):
        if pair[0] is None:
            continue
        open_.append((pair[0], pair[1]))
        text, true = (tokens.text_of(ids) for ids in zip(*open_, strict=True))
        if len(open_) == MOST_PARTS or not (text.endswith(PART) or true.endswith(PART)):
            found.append(Said(text, true, all(one == other for one, other in open_)))
            open_.clear()
    return (*found, *(Said(tokens.text_of([one]), tokens.text_of([other]), one == other) for one, other in open_))


def sweep(say: Callable[[Step], None], asked: SweepRequest, folder: Path) -> None:
    """Do what the results in `folder` lack, with what others leave of the processor."""
    os.nice(NICE)
    prepare_process((), asked.threads)
    every = victims.built_in()
    work = Sweep(
        asked.files, asked.dtype, asked.plans, LIVE, asked.defences, every[: asked.prompts], victims.ANSWER_TOKENS
    )
    with Results.open(folder, work.header(every)) as results:
        work.run(results, say)
