"""The victims and the attackers of one cut: clients with each defence, and servers that know it or do not."""

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.registry import settings
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.defences import NONE, OWN_WEIGHTS, ROTATION, flags_of
from splitlearn.privacy.own_weights import asked, fine_tune
from splitlearn.privacy.registry import Attack, Recovered
from splitlearn.privacy.rotation import recovered
from splitlearn.privacy.split_model import SplitModel, VictimSession


@dataclass
class Attacker:
    """A server with a checkpoint. `q` is the rotation of a client's states that it has found. `prepare_s` has the
    seconds that each attack has learnt."""

    checkpoint: Checkpoint
    q: Tensor | None = None
    prepare_s: dict[str, float] = field(default_factory=dict)

    def prepare(self, attack: Attack) -> float:
        """Let `attack` learn, if it has not. Returns the seconds that it took."""
        if attack.name not in self.prepare_s:
            began = time.perf_counter()
            attack.prepare(self.checkpoint)
            self.prepare_s[attack.name] = time.perf_counter() - began
        return self.prepare_s[attack.name]

    def run(self, attack: Attack, capture: Capture) -> Recovered:
        """What `attack` recovers."""
        return attack.run(capture if self.q is None else capture.turned(self.q.T), self.checkpoint)


class Opponents:
    """Those of the cut of `plan`, each loaded when it is first used. Victims answer with `answer_tokens` tokens, and
    everything random has `seed`. `kept` is a folder for what attackers learn of public layers."""

    def __init__(
        self,
        files: ModelFiles,
        plan: SplitPlan,
        dtype: str,
        answer_tokens: int,
        seed: int = 0,
        kept: Path | None = None,
    ) -> None:
        self._kept = kept
        self.plan, self._model, self._answer_tokens, self._seed = plan, (files, plan, dtype), answer_tokens, seed
        self._sessions: dict[tuple[str, str], VictimSession] = {}

    def session(self, defence: str, prompt: str) -> VictimSession:
        """The session of a client with `defence`. Raises InputError for a model that a rotation would change."""
        key = defence, prompt
        if key not in self._sessions:  # keeps the last one, and those without a defence
            self._sessions = {old: kept for old, kept in self._sessions.items() if old[0] == NONE}
            self._sessions[key] = self._victim(defence).run(prompt, flags_of(defence), self._answer_tokens)
        return self._sessions[key]

    @cached_property
    def unknowing(self) -> Attacker:
        """A server that takes every client for one without a defence."""
        return Attacker(Checkpoint(*self._model, self._seed, kept=self._kept))

    def knowing(self, defence: str) -> Attacker:
        """A server that knows the defence of its client, but not what is drawn: it learns from states that have gone
        through the same, finds the rotation by the weights that it was given, or asks a client of its own."""
        public = self.unknowing.checkpoint
        if defence == ROTATION:
            return Attacker(public, recovered(public.trunk, self._rotated.trunk.cut))
        if defence == OWN_WEIGHTS:
            return Attacker(replace(public, asked=asked(self._tuned, len(public.embeddings), self._seed + 1)))
        for known in settings(flags_of(defence)).session.defences:
            return Attacker(replace(public, knows=known))
        return self.unknowing  # there is nothing to know

    def _victim(self, defence: str) -> SplitModel:
        if defence == ROTATION:
            return self._rotated
        return self._tuned if defence == OWN_WEIGHTS else self._split

    @cached_property
    def _split(self) -> SplitModel:
        return SplitModel(*self._model, self._seed)

    @cached_property
    def _rotated(self) -> SplitModel:
        return SplitModel(*self._model, self._seed, rotated=True)

    @cached_property
    def _tuned(self) -> SplitModel:
        split = SplitModel(*self._model, self._seed)
        fine_tune(split, self._seed)
        return split
