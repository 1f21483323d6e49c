"""Attack: the server runs the client's last layers and the LM head on what it sends back, and reads the answer."""

import torch

from splitlearn.models.cut import dtype_of, forward
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import Recovered
from splitlearn.wire.hidden_states import converted


def prepare(checkpoint: Checkpoint) -> None:
    """Load the last layers and the LM head."""
    _ = checkpoint.top


def run(capture: Capture, checkpoint: Checkpoint) -> Recovered:
    """The likeliest tokens behind the prompt: those of an answer that was chosen greedily."""
    x = converted(capture.returned, dtype_of(checkpoint.top)).unsqueeze(0)
    with torch.inference_mode():
        logits = forward(checkpoint.top, x, 0, None)[0, capture.prompt_tokens - 1 :]
    return (*[None] * capture.prompt_tokens, *logits.argmax(1).tolist())
