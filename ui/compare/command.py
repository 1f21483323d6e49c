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
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """A word for a POSIX shell. What a terminal would act on, or turn around, is written as its number."""
    raw = {char for char in word if not char.isprintable()} - {"\n"}
    if not raw:
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(f"\\U{ord(char):08x}" if char in raw else char for char in plain) + "'"
