"""Attacks on many prompts, at several cuts and forms on the wire. What is in the results already is not done again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.flags.registry import settings
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.baselines import BASELINES, Baselines
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import ATTACKS, Attack
from splitlearn.privacy.results import Results, Row, header_of
from splitlearn.privacy.scores import Hits, score
from splitlearn.privacy.split_model import SplitModel, VictimSession
from splitlearn.privacy.training_text import check_disjoint
from splitlearn.privacy.victims import Victim
from splitlearn.runtime import process
from splitlearn.runtime.progress import Progress, Step
from splitlearn.wire.codec import DTYPES
from splitlearn.wire.hidden_states import Rows


@dataclass(frozen=True)
class Sweep:
    """What to do: each of `attacks` at each of `plans` and with each of `wires`, choices of the flag wire_dtype, on the
    `victims`. Raises InputError for a prompt that attacks have learnt from."""

    files: ModelFiles
    dtype: str
    plans: Sequence[SplitPlan]
    attacks: Sequence[str]
    wires: Sequence[str]
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

    def own(self, results: Results) -> list[Row]:
        """The rows of this sweep. The results may have those of other cuts, attacks and prompts, too."""
        cuts = {(plan.start, wire) for plan in self.plans for wire in self.wires}
        return [
            row
            for row in results.rows
            if row.number < len(self.victims)
            and (row.attack in BASELINES or ((row.cut, row.wire) in cuts and row.attack in self.attacks))
        ]

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
                if (0, "", name, number) not in results:
                    hits = Hits(found.right(name, own), len(own))
                    results.add(Row(0, "", name, number, victim.kind, hits, Hits(0, 0)))

    def _at(self, plan: SplitPlan, results: Results, progress: Progress) -> None:
        """One cut."""
        open_ = list(self._open(plan, results))
        if not open_:
            return
        label = f"Cut after layer {plan.start}"
        progress(Step(f"{label}: loading", 0, 1))
        split, checkpoint = (
            SplitModel(self.files, plan, self.dtype),
            Checkpoint(self.files, plan, self.dtype, self.seed),
        )
        prepare_s = dict[str, float]()
        for done, (wire, number, attacks) in enumerate(open_):
            progress(Step(f"{label}: attacks", done, len(open_)))
            session = split.run(self.victims[number].prompt, self._rows(wire), self.answer_tokens)
            for attack in attacks:
                if attack.name not in prepare_s:
                    progress(Step(f"{label}: preparing {attack.name}", 0, 1))
                    prepare_s[attack.name] = prepared(attack, checkpoint)
                results.add(self._row(attack, session, checkpoint, wire, number, prepare_s[attack.name]))

    def _open(self, plan: SplitPlan, results: Results) -> Iterator[tuple[str, int, list[Attack]]]:
        """The wires, prompts and attacks of a cut that results lack."""
        for wire in self.wires:
            for number in range(len(self.victims)):
                lacking = [name for name in self.attacks if (plan.start, wire, name, number) not in results]
                if lacking:
                    yield wire, number, [ATTACKS[name] for name in lacking]

    def _row(
        self,
        attack: Attack,
        session: VictimSession,
        checkpoint: Checkpoint,
        wire: str,
        number: int,
        prepare_s: float,
    ) -> Row:
        """Run one attack, which gets the capture and the checkpoint, and score it."""
        process.reset_peak()
        began = time.perf_counter()
        recovered = attack.run(session.capture, checkpoint)
        seconds, peak = time.perf_counter() - began, process.peak_resident_bytes()
        prompt, answer = score(session, recovered, attack.reads)
        kind, cut = self.victims[number].kind, checkpoint.plan.start
        return Row(cut, wire, attack.name, number, kind, prompt, answer, seconds, prepare_s, peak)

    def _rows(self, wire: str) -> Rows:
        """The form on the wire of a choice of wire_dtype."""
        return settings(frozenset({f"wire_dtype={wire}"})).session.rows(DTYPES[self.dtype])


def prepared(attack: Attack, checkpoint: Checkpoint) -> float:
    """Prepare an attack. Returns the seconds that it takes."""
    began = time.perf_counter()
    attack.prepare(checkpoint)
    return time.perf_counter() - began
