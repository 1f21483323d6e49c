"""splitlearn: run a causal language model whole, or split across a gRPC trunk server, and measure both.

    stages = splitlearn.load_split("smollm2-135m-instruct")
    for event in splitlearn.generate(stages, "Why is the sky blue?"):
        print(event.text, end="")

docs/library.md has more. What computes is imported when one of these names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn.arms.library import Stages, compare, generate, load_full, load_split
    from splitlearn.errors import SplitlearnError
    from splitlearn.events import Done, TokenEvent
    from splitlearn.response_format import JsonFormat
    from splitlearn.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Done",
    "JsonFormat",
    "SamplingParams",
    "SplitlearnError",
    "Stages",
    "TokenEvent",
    "compare",
    "generate",
    "load_full",
    "load_split",
]
_LIGHT = {
    "Done": "splitlearn.events",
    "JsonFormat": "splitlearn.response_format",
    "TokenEvent": "splitlearn.events",
    "SamplingParams": "splitlearn.sampling",
    "SplitlearnError": "splitlearn.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'splitlearn' has no attribute {name!r}")
    return getattr(import_module(_LIGHT.get(name, "splitlearn.arms.library")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
