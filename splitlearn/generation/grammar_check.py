"""`python -m splitlearn.generation.grammar_check`: reads a JSON Schema, and prints why answers cannot be held to it.

llguidance bounds what a mask takes, but not all that a schema takes to compile: for a text with 30 patterns that is
minutes. So each schema is compiled in this process first, which the system ends at `CPU_S` or `MEMORY_BYTES`. Of what
is installed it imports llguidance alone.
"""

import json
import sys
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CPU_S, MEMORY_BYTES = 2, 2**30
OWN_SETTINGS = "x-guidance"
"""Where a schema has settings of llguidance's own, which could make it ignore the rest."""
# A model that likes spaces too much would fill its whole answer with them.
OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ ]|\n[ \t]{0,32}"}
# A state of the lexer takes about 2 kB.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def grammar_text(schema: str) -> str:
    """The grammar of a schema, for llguidance's matchers. Raises ValueError for a text that is no JSON object."""
    return LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)


def why_not(schema: str) -> str:
    """Why answers cannot be held to `schema`; empty if they can."""
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            return "it is no JSON object"
        if OWN_SETTINGS in parsed:
            return f"{OWN_SETTINGS} is refused: it could make the rest be ignored"
        failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar_text(schema), limits=LIMITS)
    except (ValueError, RecursionError) as error:
        return str(error)
    return reasons[0] if failed else ""


def _bound() -> None:
    """Have the system end this process beyond its limits."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    _bound()
    sys.stdout.buffer.write(why_not(sys.stdin.buffer.read().decode()).encode())
