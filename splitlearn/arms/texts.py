"""The texts of a generation's token ids. A worker makes them, since the page's process has no tokenizer."""

from collections.abc import Iterable

from splitlearn.arms.spec import Texts
from splitlearn.events import Event, GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import of_samples


def texts_of(tokens: Tokens, events: Iterable[Event], request: GenerationRequest) -> Texts:
    """The texts of prompt and answers; none of a generation that gave nothing."""
    samples = of_samples(events, request.samples)
    if not samples:
        return Texts()
    answers = tuple(tuple(tokens.decode([token]) for token in sample.token_ids) for sample in samples)
    prompt = samples[0].prompt_ids
    return Texts(tuple(tokens.pieces(prompt)), answers, tuple(tokens.each(prompt)))
