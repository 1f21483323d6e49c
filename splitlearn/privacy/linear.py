"""Attack: a linear map from states to embeddings, learnt from other text, then the closest embedding."""

from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import Recovered


def prepare(checkpoint: Checkpoint) -> None:
    """Learn the two maps, and index the embeddings."""
    _ = checkpoint.first, checkpoint.later, checkpoint.embedding_table


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The tokens at all positions that were sent."""
    return tuple(checkpoint.embedding_table.closest(checkpoint.linear(capture.sent.float())))
