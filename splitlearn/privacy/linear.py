"""Attack: a linear map from states to embeddings, learnt from other text, then the closest embedding."""

import torch
from torch import Tensor

from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import Recovered


def prepare(checkpoint: Checkpoint) -> None:
    """Learn the two maps, and index the embeddings."""
    _ = checkpoint.first, checkpoint.later, checkpoint.embedding_table


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The tokens at all positions that were sent."""
    return tuple(checkpoint.embedding_table.closest(predicted(capture, checkpoint)))


def predicted(capture: Capture, checkpoint: Checkpoint) -> Tensor:
    """The embedding [T, E] that the maps give for each position."""
    x = capture.sent.float()
    return torch.cat([checkpoint.first(x[:1]), checkpoint.later(x[1:])])
