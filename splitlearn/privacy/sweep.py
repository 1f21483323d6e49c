"""Attacks on many prompts, at several cuts and with several defences. What results have is not done again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import eq

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.baselines import BASELINES, Baselines
from splitlearn.privacy.defences import NONE, knowledge
from splitlearn.privacy.opponents import Attacker, Opponents
from splitlearn.privacy.registry import ATTACKS, Attack
from splitlearn.privacy.results import Results, Row, header_of
from splitlearn.privacy.scores import Hits, score
from splitlearn.privacy.training_text import check_disjoint
from splitlearn.privacy.victims import Victim
from splitlearn.runtime import process
from splitlearn.runtime.progress import Progress, Step


@dataclass(frozen=True)
class Sweep:
    """What to do: each of `attacks` at each of `plans` and against each of `defences` (defences.py) alone, on the
    `victims`; where it matters, by an attacker who knows the defence and by one who does not. Raises InputError for a
    prompt that attacks have learnt from."""

    files: ModelFiles
    dtype: str
    plans: Sequence[SplitPlan]
    attacks: Sequence[str]
    defences: Sequence[str]
    victims: Sequence[Victim]
    answer_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if any(ATTACKS[name].learns for name in self.attacks):
            check_disjoint([victim.prompt for victim in self.victims])

    def header(self, every_victim: Sequence[Victim]) -> dict[str, object]:
        """What all its rows have in common. `every_victim` has all prompts, of which this may do the first few."""
        end = self.plans[0].end
        return header_of(self.files, self.dtype, end, self.answer_tokens, self.seed, every_victim)

    def run(self, results: Results, progress: Progress) -> None:
        """Do what `results` lack. Raises InputError for a prompt that does not fit into the model's context."""
        self._baselines(self._ids(), results, progress)
        for plan in self.plans:
            self._at(plan, results, progress)

    def _ids(self) -> list[list[int]]:
        """The token ids of each prompt."""
        tokens, context = Tokens.load(self.files.folder, use_fast=True), self.files.facts.context_length
        ids = [tokens.encode(victim.prompt, chat=False) for victim in self.victims]
        for number, own in enumerate(ids, 1):
            if context is not None and len(own) + self.answer_tokens > context:
                expected = f"at most {context - self.answer_tokens} tokens, for answers of {self.answer_tokens}"
                raise InputError(f"prompts, number {number}", f"{len(own)} tokens", expected)
        return ids

    def _baselines(self, ids: Sequence[list[int]], results: Results, progress: Progress) -> None:
        found = Baselines(self.files, self.dtype)
        for number, (victim, own) in enumerate(zip(self.victims, ids, strict=True)):
            progress(Step("Guessing without hidden states", number, len(ids)))
            for name in BASELINES:
                if (0, "", None, name, number) not in results:
                    hits = Hits(found.right(name, own), len(own))
                    results.add(Row(0, "", None, name, number, victim.kind, hits, Hits(0, 0)))

    def _at(self, plan: SplitPlan, results: Results, progress: Progress) -> None:
        """One cut."""
        opponents = Opponents(self.files, plan, self.dtype, self.answer_tokens, self.seed)
        for defence in self.defences:
            label, attackers = f"Cut after layer {plan.start}, defence {defence}", dict[bool | None, Attacker]()
            open_ = list(self._open(plan, defence, results))
            for done, (number, attack, knows) in enumerate(open_):
                progress(Step(f"{label}: attacks", done, len(open_)))
                if knows not in attackers:
                    attackers[knows] = opponents.knowing(defence) if knows else opponents.unknowing
                if attack.name not in attackers[knows].prepare_s:
                    progress(Step(f"{label}: preparing {attack.name}", 0, 1))
                results.add(self._row(opponents, defence, number, attack, knows, attackers[knows]))

    def _open(self, plan: SplitPlan, defence: str, results: Results) -> Iterator[tuple[int, Attack, bool | None]]:
        """The prompts, attacks and kinds of attackers that results lack of a cut with a defence."""
        for number, name in product(range(len(self.victims)), self.attacks):
            for knows in knowledge(defence, ATTACKS[name]):
                if (plan.start, defence, knows, name, number) not in results:
                    yield number, ATTACKS[name], knows

    def _row(
        self,
        opponents: Opponents,
        defence: str,
        number: int,
        attack: Attack,
        knows: bool | None,
        attacker: Attacker,
    ) -> Row:
        """Run one attack, which gets the capture and the checkpoint, and score it."""
        victim = self.victims[number]
        session, plain = (opponents.session(each, victim.prompt) for each in (defence, NONE))
        prepare_s, capture = attacker.prepare(attack), session.capture
        process.reset_peak()
        began = time.perf_counter()
        recovered = attacker.run(attack, capture)
        seconds, peak = time.perf_counter() - began, process.peak_resident_bytes()
        prompt, answer = score(session, recovered, attack.reads)
        same = Hits(sum(map(eq, session.answer_ids, plain.answer_ids)), len(plain.answer_ids))
        where, size = (opponents.plan.start, defence, knows), 2 * capture.rows.row_bytes(capture.sent.shape[1])
        hits, loss = (prompt, answer), session.loss
        return Row(*where, attack.name, number, victim.kind, *hits, seconds, prepare_s, peak, same, loss, size)
