"""The judge of a proof: what the uncut model gives when transformers runs it, and nothing of this project does.

`generate()` decodes greedily from a prompt, past every boundary that a tiny copy has: its text is what the stages are
given, token by token, and its logits and tokens are what theirs must be, with a cache and without. What a prompt's own
tokens must give is a plain call of the model.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor
from transformers.utils import logging

from splitlearn.errors import FamilyRefused
from splitlearn.stages.equivalence.tiny import CONTEXT, VOCABULARY
from splitlearn.stages.verify import rounding

TOTAL = CONTEXT + 6
"""Tokens of a text: more than any boundary."""
PENALTY = 1.5
"""Of the tokens that were said. A random model with a tied head says its last token again and again otherwise."""
TOLERANCE = rounding(torch.float32)
"""Between one pass and steps of the same model, which add in another order; relative to the largest logit."""


@dataclass(frozen=True)
class Text:
    """What `generate()` made of a prompt."""

    ids: Tensor
    """int64 [1, TOTAL], with the prompt."""
    prompt: int
    """Tokens of the prompt."""
    logits: Tensor
    """[TOTAL - 1, V]: what the model says after each token but the last."""


def prompt_ids(tokens: int) -> Tensor:
    """A prompt: int64 [1, tokens]."""
    return (torch.arange(tokens) * 37 % (VOCABULARY - 3) + 2).unsqueeze(0)


@torch.no_grad()
def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """The model called the plain way, [1, T, V]: it chooses positions and masks itself.

    A copy is called, here and in `generated`: some modules remember the longest text that they were given.
    """
    logits: Tensor = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits
    return logits


def check_whole(model: Any) -> None:
    """Raise FamilyRefused for a model that is no causal decoder, or whose random weights show nothing."""
    ids = prompt_ids(TOTAL)
    own = plain_logits(model, ids)
    if not own.isfinite().all():
        raise FamilyRefused("a tiny copy with random weights gives no finite logits")
    changed = ids.clone()
    changed[0, -1] += 1
    if (own - plain_logits(model, changed))[:, :-1].abs().max().item() > TOLERANCE * own.abs().max().item():
        raise FamilyRefused("it looks at later tokens: not a causal decoder as configured")


def generated(model: Any, prompt: int) -> Text:
    """What `generate()` makes of a prompt of so many tokens. Raises FamilyRefused where it does not run."""
    ids = prompt_ids(prompt)
    wanted = GenerationConfig(
        max_new_tokens=TOTAL - prompt,
        repetition_penalty=PENALTY,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, model = [plain_logits(model, ids)[0, :-1]], copy.deepcopy(model)
    model.generation_config = GenerationConfig(pad_token_id=0)  # with the model's own it may end before the text does
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the text is longer than the context is what is tried
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)
    except Exception as error:  # whatever a family's own code raises is the answer for that family
        line = (str(error).strip().splitlines() or [""])[0][:120]
        raise FamilyRefused(f"transformers' own generate() does not run ({type(error).__name__}: {line})") from error
    finally:
        logging.set_verbosity(verbosity)
    return Text(out.sequences, prompt, torch.cat([*logits, *out.logits]))


def other_token(text: Text, logits: Tensor) -> int | None:
    """The first position of the text at which `logits` [TOTAL - 1, V] would have said another token, if any."""
    penalty = RepetitionPenaltyLogitsProcessor(PENALTY)
    for at in range(text.prompt, TOTAL):
        said = penalty(text.ids[:, :at], logits[at - 1 : at].clone()).argmax().item()
        if said != text.ids[0, at].item():
            return at
    return None
