"""Attack: token by token, candidates go through the client's layers behind what is recovered so far, until one gives
the state that arrived.

The first guess at all positions is that of `linear`, or of `inverter` behind more than SHALLOW layers. One forward of
the guesses behind the recovered prefix confirms as many of them as are right: each position's state depends on the
tokens up to it, and on nothing else. At the first wrong one, BATCH candidates at a time are tried, from two rankings.
One is that of the guess. For the other, what is left between the nearest state so far and the one that arrived goes
through the linear map, and so says how the embedding has to change: the rest of the sentence is in both.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitlearn.kvcache.layers import dynamic
from splitlearn.models.cut import forward
from splitlearn.privacy import inverter, linear
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.linear_map import LinearMap
from splitlearn.privacy.registry import Recovered
from splitlearn.stages.base import StageInput
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings

SHALLOW = 4
"""Layers up to which the linear map guesses: it is learnt in seconds. Behind 8 layers of the default model it ranks 85%
of the tokens among its first BATCH, and the inverter 97%; behind 16, 72% and 92%."""
BATCH = 64
"""Candidates in one forward."""
MOST_CANDIDATES = 2048
"""Candidates at a position before the nearest one so far is taken."""
AHEAD = 32
"""Guesses that are confirmed in one forward."""
SAME_SHARE, CLOSE = 0.9, 1e-4
"""A candidate gives the state that arrived if this share of its values, after the rounding of the wire, are within
CLOSE of it: relative to the value, or to the row's median value. Rounding of another order of the same operations is
1e-6 of it; of two tokens, few values agree."""
SURE = 4
"""Under noise that the attacker knows, a candidate gives the state that arrived if the mean square of what is left, in
deviations of the noise, is within SURE * sqrt(2 / H) of 1: that of noise is beyond it for one state in 15,000."""
_SETTINGS = SessionSettings(new_cache=dynamic, gradient_guard=torch.inference_mode)


def prepare(checkpoint: Checkpoint) -> None:
    """Learn what guesses."""
    (linear if _shallow(checkpoint) else inverter).prepare(checkpoint)


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The tokens at all positions that were sent."""
    search = _Search(capture, checkpoint)
    while search.settled < len(search.guesses):
        search.confirm()
        if search.settled < len(search.guesses):
            search.find()
    return tuple(search.guesses)


def _shallow(checkpoint: Checkpoint) -> bool:
    """Whether the linear map guesses."""
    return checkpoint.plan.start <= SHALLOW


@dataclass
class _Tried:
    """The candidates so far at a position: their ids, and the nearest with its state [H] and distance."""

    ids: list[int] = field(default_factory=list)
    best: int = -1
    state: Tensor | None = None
    distance: float = float("inf")


class _Search:
    """The search for one capture. The first `settled` of `guesses` are recovered."""

    def __init__(self, capture: Capture, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._rows = checkpoint, capture.rows
        self._target = capture.sent.float()
        self._predicted = (checkpoint.linear if _shallow(checkpoint) else checkpoint.inverted)(self._target)
        self.guesses = checkpoint.embedding_table.closest(self._predicted)
        self.settled = 0
        self._session: LocalSession = checkpoint.bottom.open(_SETTINGS, len(self.guesses))

    def confirm(self) -> None:
        """Settle the guesses that give the states that arrived, up to the first that does not."""
        begin, end = self._session.length, self.settled + AHEAD  # a token that was found is not in the cache yet
        ids = torch.tensor([self.guesses[begin:end]])
        (output,) = self._checkpoint.bottom.step([StageInput(self._session, begin, ids)])
        same = self._same(output.x[0, self.settled - begin :].float(), self._target[self.settled : end])
        self.settled += int(same.long().cumprod(0).sum())

    def find(self) -> None:
        """Settle the next position by trying candidates: the one that gives the state, or the nearest."""
        at, tried = self.settled, _Tried()
        self._session.make_room(at, 0)
        wanted = [self._predicted[at]]
        while len(tried.ids) < min(MOST_CANDIDATES, len(self._checkpoint.embeddings)):
            if self._try(self._candidates(wanted, tried), tried):
                break
            assert tried.state is not None
            change = self._map.change(self._target[at] - tried.state)
            wanted = [self._predicted[at], self._checkpoint.embeddings[tried.best] + change]
        self.guesses[at] = tried.best
        self.settled += 1

    def _candidates(self, wanted: Sequence[Tensor], tried: _Tried) -> list[int]:
        """BATCH tokens that were not tried: equally many of the closest embeddings to each of `wanted`."""
        found, each = list[int](), BATCH // len(wanted)
        for likeness in self._checkpoint.embedding_table.likeness(torch.stack(list(wanted))):
            likeness[[*tried.ids, *found]] = -torch.inf
            left = len(likeness) - len(tried.ids) - len(found)
            found += likeness.topk(min(each, left)).indices.tolist()
        return found

    def _try(self, ids: list[int], tried: _Tried) -> bool:
        """Try candidates. Whether one gives the state; it is then the best."""
        states, target = self._states(ids), self._target[self.settled]
        same, sent, noise = self._same(states, target), self._sent(states), self._noise(states)
        if noise is None:
            distances = ((sent - target) / self._map.scale).norm(dim=1)
            distances[same] = 0.0
        else:  # the negative logarithm of the likelihood, but for a constant
            distances = ((sent - target) / noise).square().sum(1) / 2 + len(target) * noise[:, 0].log()
        best = int(distances.argmin())
        if float(distances[best]) < tried.distance:
            tried.best, tried.state, tried.distance = ids[best], sent[best], float(distances[best])
        tried.ids += ids
        return bool(same.any())

    def _states(self, ids: list[int]) -> Tensor:
        """The states [N, H] of each of `ids` behind the recovered prefix."""
        cache = copy.deepcopy(self._session.cache) if self.settled else None
        if cache is not None:
            cache.batch_repeat_interleave(len(ids))
        with torch.inference_mode():
            return forward(self._checkpoint.bottom.cut, torch.tensor(ids).unsqueeze(1), self.settled, cache)[
                :, 0
            ].float()

    def _same(self, states: Tensor, target: Tensor) -> Tensor:
        """Which of `states` [N, H] are `target` [N, H] or [H], but for rounding, and for noise that the attacker knows
        of."""
        noise, size = self._noise(states), target.abs()
        if noise is not None:
            square = ((self._sent(states) - target) / noise).square().mean(dim=-1)
            return (square - 1).abs() <= SURE * math.sqrt(2 / states.shape[-1])
        close = max(CLOSE, 4 * torch.finfo(self._checkpoint.bottom.dtype).eps)
        near = close * torch.maximum(size, size.median(dim=-1, keepdim=True).values)
        return ((self._sent(states) - target).abs() <= near).float().mean(dim=-1) >= SAME_SHARE

    def _sent(self, states: Tensor) -> Tensor:
        """What would arrive [N, H] of states that a client computes, without the noise."""
        knows = self._checkpoint.knows
        own = (states if knows is None else knows.mean(states)).to(self._checkpoint.bottom.dtype).unsqueeze(0)
        return self._rows.from_bytes(self._rows.to_bytes(own), states.shape[-1])[0].float()

    def _noise(self, states: Tensor) -> Tensor | None:
        """The standard deviation [N, 1] of the noise of `states`, if the attacker knows of any."""
        knows = self._checkpoint.knows
        return None if knows is None else knows.deviation(states)

    @property
    def _map(self) -> LinearMap:
        """The map at the next position."""
        return self._checkpoint.later if self.settled else self._checkpoint.first
