"""The command line that repeats a comparison of the page."""

import shlex
from collections.abc import Sequence

from splitlearn.events import GenerationRequest
from splitlearn.runtime import programs
from splitlearn.sampling import SamplingParams


def command(request: GenerationRequest, flags: str, pairs: int, link: str | None, options: Sequence[str] = ()) -> str:
    """`python -m splitlearn compare ...` for this request. `options` are those for the same settings, such as
    --config."""
    words = [programs.spoken(), "-m", "splitlearn", "compare", *options, "--prompt", request.text]
    words += ["--max-new-tokens", str(request.max_new_tokens), "--flags", flags, "--pairs", str(pairs)]
    words += ["--ignore-eos"] * request.ignore_eos + ["--raw"] * (request.chat is False)
    words += ["--chat-template", request.chat] if isinstance(request.chat, str) else []
    words += [word for text in request.stop for word in ("--stop", text)]
    usual, chosen = SamplingParams(), request.sampling
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed"):
        if getattr(chosen, name) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    words += ["--samples", str(request.samples)] * (request.samples > 1)
    words += ["--link", link] if link else []
    return shlex.join(words)
