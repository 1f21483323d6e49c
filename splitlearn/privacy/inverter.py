"""Attack: a recurrent network from the states so far to embeddings, trained on other text, then the closest one."""

from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import Recovered


def prepare(checkpoint: Checkpoint) -> None:
    """Learn the linear maps and the network."""
    _ = checkpoint.recurrent, checkpoint.embedding_table


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The tokens at all positions that were sent."""
    return tuple(checkpoint.embedding_table.closest(checkpoint.inverted(capture.sent.float())))
