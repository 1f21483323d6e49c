"""A recurrent network from the states of a sequence to embeddings: what it adds to the linear maps.

A state holds something of the tokens before it. A linear map of one state cannot tell that from the token; a network
that reads the states in turn can.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitlearn.privacy.linear_map import LinearMap
from splitlearn.privacy.token_table import TokenTable

UNITS = 384
EPOCHS, AT_ONCE, RATE = 4, 16, 2e-3
OTHERS = 2048
"""Wrong tokens, drawn for each step, beside those of the step itself: the whole vocabulary would take most of the
time."""
LARGEST = 8.0
"""Of a standardised value: a few values of the first position are thousands."""
RECIPE = (UNITS, EPOCHS, AT_ONCE, RATE, OTHERS, LARGEST)
"""What it becomes of the same states follows from these and the seed."""


class RecurrentMap(nn.Module):
    """Maps states [N, T, H] from position 0 on, and the linear maps' embeddings of them [N, T, E], to embeddings."""

    def __init__(self, later: LinearMap, table: TokenTable) -> None:
        super().__init__()
        self._later, self._table = later, table
        self.units = nn.GRU(len(later.mean), UNITS, batch_first=True)
        self.out = nn.Linear(UNITS, len(table.scale))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, linear: Tensor) -> Tensor:
        standard = ((x - self._later.mean) / self._later.scale).clamp(-LARGEST, LARGEST)
        more: Tensor = self.out(self.units(standard)[0])
        return linear + self._table.scale * more

    @classmethod
    def fit(
        cls, x: Tensor, linear: Tensor, ids: Tensor, later: LinearMap, table: TokenTable, seed: int
    ) -> "RecurrentMap":
        """Train it on states `x` [N, T, H] with `linear` [N, T, E] of the tokens `ids` [N, T]: the cosine between each
        embedding and that of the right token has to be larger than with others."""
        made = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            network = cls(later, table)
        sharpness = nn.Parameter(torch.tensor(3.0))
        optimizer = torch.optim.AdamW([*network.parameters(), sharpness], RATE)
        steps = EPOCHS * math.ceil(len(ids) / AT_ONCE)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
        for _ in range(EPOCHS):
            for some in torch.split(torch.randperm(len(ids), generator=made), AT_ONCE):
                truth = ids[some].flatten()
                drawn = torch.randint(len(table.directions), (OTHERS,), generator=made)
                tokens = torch.unique(torch.cat([truth, drawn]))
                found = network(x[some], linear[some]).flatten(0, 1)
                likeness = table.likeness(found, tokens) * sharpness.exp()
                loss = functional.cross_entropy(likeness, torch.searchsorted(tokens, truth))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                rates.step()
        return network.eval()
