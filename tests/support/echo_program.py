"""The program of a sandbox for tests: it answers, or does what a hostile one would."""

import os
import signal
from typing import Any

from splitlearn.runtime import sandbox_child

MEMORY_BYTES = 256 << 20
kept: list[bytearray] = []


def answer(request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "loop":
            while True:
                pass
        case "multiply":
            return {"text": (3 ** (1 << 24)) ** 2 % 10}
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hoard":
            bytearray(1 << 30)
        case "keep":
            kept.append(bytearray(100 << 20))
    return {"pid": os.getpid(), "text": request.get("text")}


if __name__ == "__main__":
    sandbox_child.serve(answer, MEMORY_BYTES)
