"""The reference of an equivalence test: the uncut model, run by transformers alone.

`generate()` decodes greedily from a prompt, past every boundary of a tiny copy. The stages get its text token by token,
and must give its logits and tokens, with a cache and without. The reference for the prompt's own tokens is a plain call
of the model.
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
"""The repetition penalty. Without it a random model with a tied head repeats its last token for ever."""
TOLERANCE = rounding(torch.float32)
"""Between one forward and several steps of a model, which add in another order; relative to the largest logit."""


@dataclass(frozen=True)
class Text:
    """The output of `generate()` for a prompt."""

    ids: Tensor
    """int64 [1, TOTAL], including the prompt."""
    prompt: int
    """Tokens of the prompt."""
    logits: Tensor
    """[TOTAL - 1, V]: the logits after each token but the last."""


def prompt_ids(tokens: int) -> Tensor:
    """A prompt: int64 [1, tokens]."""
    return (torch.arange(tokens) * 37 % (VOCABULARY - 3) + 2).unsqueeze(0)


@torch.no_grad()
def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """The logits [1, T, V] of a plain call: the model chooses positions and masks itself.

    Here and in `generated` a copy is called: some modules remember the longest text of their calls.
    """
    logits: Tensor = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits
    return logits


def check_whole(model: Any) -> None:
    """Raise FamilyRefused for a model that is not a causal decoder, or that gives no finite logits."""
    ids = prompt_ids(TOTAL)
    own = plain_logits(model, ids)
    if not own.isfinite().all():
        raise FamilyRefused("a tiny copy with random weights gives no finite logits")
    changed = ids.clone()
    changed[0, -1] += 1
    if (own - plain_logits(model, changed))[:, :-1].abs().max().item() > TOLERANCE * own.abs().max().item():
        raise FamilyRefused("it looks at later tokens: not a causal decoder as configured")


def generated(model: Any, prompt: int) -> Text:
    """The text that `generate()` makes from `prompt` tokens. Raises FamilyRefused if it does not run."""
    ids = prompt_ids(prompt)
    generation = GenerationConfig(
        max_new_tokens=TOTAL - prompt,
        repetition_penalty=PENALTY,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, model = [plain_logits(model, ids)[0, :-1]], copy.deepcopy(model)
    model.generation_config = GenerationConfig(pad_token_id=0)  # the model's own may end the text early
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the text is longer than the context on purpose
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
    except Exception as error:  # any error of a family's own code is the result for that family
        line = (str(error).strip().splitlines() or [""])[0][:120]
        raise FamilyRefused(f"transformers' own generate() does not run ({type(error).__name__}: {line})") from error
    finally:
        logging.set_verbosity(verbosity)
    return Text(out.sequences, prompt, torch.cat([*logits, *out.logits]))


def other_token(text: Text, logits: Tensor) -> int | None:
    """The first position of the text at which `logits` [TOTAL - 1, V] give another token, if there is one."""
    penalty = RepetitionPenaltyLogitsProcessor(PENALTY)
    for at in range(text.prompt, TOTAL):
        token = penalty(text.ids[:, :at], logits[at - 1 : at].clone()).argmax().item()
        if token != text.ids[0, at].item():
            return at
    return None
