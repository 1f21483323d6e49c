"""`python -m bench.llama_worker GGUF THREADS [LAYERS]`: llama.cpp in a process where no other library set up OpenMP.

With LAYERS, an RPC server computes that many of the last layers, in its own process with as many threads. Each line on
stdin is JSON, [ids, count]; each line on stdout is [new ids, TTFT, TPOT], times in seconds.
"""

import ctypes
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
START_S = 20.0


def main() -> None:
    """Answer until stdin ends."""
    gguf, threads, *remote = sys.argv[1:]
    if remote:
        _use_server(int(threads))
    layers = int(remote[0]) if remote else 0
    model = Llama(
        gguf, n_ctx=1024, n_threads=int(threads), n_threads_batch=int(threads), n_gpu_layers=layers, verbose=False
    )
    for line in sys.stdin:
        print(json.dumps(_generated(model, *json.loads(line))), flush=True)


def _use_server(threads: int) -> None:
    """Start an RPC server and register its CPU as a device of this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    multiprocessing.get_context("spawn").Process(target=_serve, args=(port, threads), daemon=True).start()
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    rpc, base = _library("ggml-rpc"), _library("ggml")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    base.ggml_backend_register(ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())))


def _serve(port: int, threads: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its banner would mix with the answers
    base = _library("ggml")
    base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(base.ggml_backend_dev_by_type(0))  # the processor
    start = _library("ggml-rpc").ggml_backend_rpc_start_server
    start(f"127.0.0.1:{port}".encode(), None, ctypes.c_size_t(threads), ctypes.c_size_t(1), devices)


def _library(name: str) -> ctypes.CDLL:
    # By the name that libllama loads: the wheel has copies in the place of links, and each would be loaded again.
    return ctypes.CDLL(str(LIBRARIES / f"lib{name}.so.0"), mode=ctypes.RTLD_GLOBAL)


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
