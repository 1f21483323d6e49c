"""What flags change in the decode loop and the tokenizer. The defaults are what runs when every flag is off."""

from collections.abc import Callable
from dataclasses import dataclass

from splitlearn.generation.sampler import TopK, top_k_by_sort
from splitlearn.generation.speculation import Proposer


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is generated.

    `proposers` make what guesses an answer's next tokens, the first of which is asked first; `draft_model` puts a
    second model behind them. Without either, tokens are decoded one by one. `head_overlap` begins the next step before
    the LM head is done. `piece_tokens` is how many tokens of a prompt go through the stages at once; None: all.
    """

    use_fast_tokenizer: bool = False
    top_k: TopK = top_k_by_sort
    proposers: tuple[Callable[[], Proposer], ...] = ()
    draft_model: bool = False
    head_overlap: bool = False
    piece_tokens: int | None = None
