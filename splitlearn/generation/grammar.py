"""Constrained decoding: an answer that is JSON, by `response_format`, or a call of a tool, by `must_call`.

Before each token, llguidance computes which tokens can come next, and all others are masked. The end token is among
them only where the JSON is complete. A schema is compiled in the process that computes, once a request, after it has
shown in a process of its own that it compiles (grammar_check.py).
"""

import json
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.generation.tool_calls import CallForm
from splitlearn.response_format import FIELD, JsonFormat
from splitlearn.runtime import programs
from splitlearn.tools import Tool

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ANY_OBJECT = '{"type": "object"}'
CHECK_S = 60.0
"""How long the check of a schema may take; it is killed after two seconds of computing."""


class Grammar:
    """The tokens that one answer can have next, given those that it has."""

    def __init__(self, matcher: "LLMatcher", field: str = FIELD) -> None:
        self._matcher, self._field = matcher, field

    @classmethod
    def compile(cls, wanted: JsonFormat, tokens: Tokens) -> "Grammar":
        """The grammar at an answer's start. Raises InputError for a schema that answers cannot be held to."""
        from llguidance import LLMatcher

        from splitlearn.generation import grammar_check

        schema = ANY_OBJECT
        if wanted.schema is not None:
            schema = wanted.schema
            check(schema)
        text = grammar_check.grammar_text(schema)
        return cls(LLMatcher(_vocabulary(tokens), text, log_level=0, limits=grammar_check.LIMITS))

    @classmethod
    def of_call(cls, form: CallForm, tools: Sequence[Tool], tokens: Tokens) -> "Grammar":
        """The grammar of an answer that is one call of one of `tools`, with arguments as its schema describes them.

        Raises InputError for a schema that answers cannot be held to."""
        from llguidance import LLMatcher

        from splitlearn.generation import grammar_check

        rules = [f"start: {' | '.join(f'call{at}' for at, _ in enumerate(tools))}"]
        for at, tool in enumerate(tools):
            before, after = json.dumps(form.before + tool.name + form.between), json.dumps(form.after)
            schema = {**json.loads(tool.parameters), "type": "object"}
            check(json.dumps(schema), "tools")
            schema[grammar_check.OWN_SETTINGS] = grammar_check.OPTIONS
            rules.append(f"call{at}: {before} arguments{at} {after}\narguments{at}: %json {json.dumps(schema)}")
        text = LLMatcher.grammar_from_lark("\n".join(rules))
        return cls(LLMatcher(_vocabulary(tokens), text, log_level=0, limits=grammar_check.LIMITS), "tools")

    def copy(self) -> "Grammar":
        """The same for another answer."""
        return Grammar(self._matcher.deep_copy(), self._field)

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [V] in float32 on the CPU, with -inf for each token that cannot come next. Raises InputError where a
        schema is beyond the limits, or no JSON fits it."""
        allowed = self._matcher.compute_bitmask()  # a bit a token
        if self._matcher.is_error():
            raise _refused("this schema", self._matcher.get_error(), self._field)
        bits = np.unpackbits(np.frombuffer(allowed, np.uint8), count=len(logits), bitorder="little")
        # numpy's: torch would wake its threads for so few numbers.
        return torch.from_numpy(np.where(bits.view(bool), logits.float().cpu().numpy(), np.float32(-np.inf)))

    def take(self, token: int) -> None:
        """The answer has `token` next."""
        self._matcher.consume_token(token)


@lru_cache(maxsize=1)
def _vocabulary(tokens: Tokens) -> "LLTokenizer":
    """llguidance's view of a tokenizer: 0.7 s for 49,152 tokens. Raises InputError for one that it cannot take."""
    from llguidance import LLTokenizer

    text = tokens.serialized()
    if text is None or not tokens.eos_ids:
        expected = "none for this model: its tokenizer has no Rust implementation, or it has no end token"
        raise InputError(FIELD, "json", expected)
    return LLTokenizer(text, eos_token=sorted(tokens.eos_ids))


@lru_cache(maxsize=64)
def check(schema: str, field: str = FIELD) -> None:
    """Raise InputError, for `field`, if a schema does not compile within the limits. One that does is checked once:
    0.1 s."""
    command, env = programs.command("splitlearn.generation.grammar_check"), programs.environment()
    try:
        done = subprocess.run(command, input=schema.encode(), env=env, capture_output=True, check=True, timeout=CHECK_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise _refused(schema, "it takes too much time or memory to compile", field) from error
    if done.stdout:
        raise _refused(schema, done.stdout.decode(), field)


def _refused(schema: str, reason: str, field: str) -> InputError:
    shown = schema if len(schema) <= 80 else f"{schema[:80]} ..."
    said = " ".join(reason.replace("<non-verbose/>", "").split())[:300]
    return InputError(field, shown, f"a JSON Schema that answers can be held to: {said}")
