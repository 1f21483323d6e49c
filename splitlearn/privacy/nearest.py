"""Attack: the token whose state alone, at the cut, is nearest to the state that arrived."""

from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import Recovered


def prepare(checkpoint: Checkpoint) -> None:
    """Run every token of the vocabulary, alone, through the client's layers."""
    _ = checkpoint.single_tokens


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The tokens at all positions that were sent."""
    return tuple(checkpoint.single_tokens.closest(capture.sent.float()))
