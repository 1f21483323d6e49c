"""A defence without a flag: first layers of the client's own, fine-tuned and kept secret. All else stays public.

A server that knows of it learns from other states: it asks. It uses the client's program like anybody, with prompts of
its own, and keeps the pairs of known tokens and the states that arrive for them.
"""

import torch
from torch.nn import functional

from splitlearn.models.cut import forward
from splitlearn.privacy.checkpoint import Pairs
from splitlearn.privacy.split_model import SplitModel
from splitlearn.privacy.training_text import training_text, windows
from splitlearn.stages.loading import put

LENGTH = 64
"""Tokens of a sequence."""
STEPS, AT_ONCE, RATE = 16, 4, 3e-4
"""Of the fine-tuning."""
ASKED = 64
"""The prompts of LENGTH tokens that the server asks."""


def fine_tune(split: SplitModel, seed: int) -> None:
    """Train the embeddings and first layers of `split`, in place, to predict the next token of places in the training
    text. The LM head keeps its weights, also where the embeddings were the same."""
    first, *rest = split.cuts
    for name, weight in list(first.module.named_parameters()):
        put(first.module, name, weight.detach().clone(), is_parameter=True)
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in first.module.parameters()], RATE)
    text = split.tokens.encode(training_text(), chat=False)
    ids = windows(text, 1, 2 * STEPS * AT_ONCE, LENGTH, seed)[: STEPS * AT_ONCE]  # the half that is of the text
    for some in torch.split(ids, AT_ONCE):
        x = forward(first, some, 0, None)
        for stage in rest:
            x = forward(stage, x, 0, None)
        loss = functional.cross_entropy(x[:, :-1].flatten(0, 1).float(), some[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    first.module.requires_grad_(False)


def asked(split: SplitModel, vocabulary: int, seed: int) -> Pairs:
    """What a server has of ASKED prompts to `split`, half of them from the training text and half of random tokens."""
    text = split.tokens.encode(training_text(), chat=False)
    ids = windows(text, vocabulary, ASKED, LENGTH, seed)
    with torch.inference_mode():
        return Pairs(ids, forward(split.cuts[0], ids, 0, None).float())
