"""Settings of the decode loop and the tokenizer that flags change. The defaults are those of a run without flags."""

from collections.abc import Callable
from dataclasses import dataclass

from splitlearn.generation.sampler import TopK, top_k_by_sort
from splitlearn.generation.speculation import Proposer


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is generated.

    `proposers` make the proposers of drafts, in the order in which they are tried; `draft_model` adds a second model
    behind them. Without either, tokens are decoded one by one. `head_overlap` starts the next step before the LM head
    is done. `chunk_tokens` is how many tokens of a prompt go through the stages at once; None: all.
    """

    use_fast_tokenizer: bool = False
    top_k: TopK = top_k_by_sort
    proposers: tuple[Callable[[], Proposer], ...] = ()
    draft_model: bool = False
    head_overlap: bool = False
    chunk_tokens: int | None = None
