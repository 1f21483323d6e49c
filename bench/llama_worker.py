"""`python -m bench.llama_worker GGUF THREADS`: llama.cpp in a process in which no other library has set up OpenMP.

Each line on stdin is JSON, [ids, count]; each on stdout is [new ids, TTFT, TPOT], in seconds.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Answer until stdin ends."""
    gguf, threads = sys.argv[1], int(sys.argv[2])
    model = Llama(gguf, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        print(json.dumps(_generated(model, *json.loads(line))), flush=True)


def _generated(model: Any, ids: Sequence[int], count: int) -> tuple[list[int], float, float]:
    found, times, started = list[int](), list[float](), time.perf_counter()
    model.reset()
    model.eval(ids)
    for number in range(count):
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), (model.n_vocab(),))
        found.append(int(logits.argmax()))
        times.append(time.perf_counter())
        if number + 1 < count:
            model.eval(found[-1:])
    return found, times[0] - started, (times[-1] - times[0]) / max(1, count - 1)


if __name__ == "__main__":
    main()
