"""Settings of the native libraries under torch and gRPC, which read them from the environment when they are loaded."""

import os

DEFAULTS = {
    # Client and trunk take turns on the same cores. A pool of threads that spins while idle takes them from the other
    # side. Split took 1.21 [1.17, 1.24] times full with GNU OpenMP's own default (6 pairs), and takes 1.10 [1.08, 1.12]
    # with this (12 pairs).
    "OMP_WAIT_POLICY": "PASSIVE",
    # GOMP_SPINCOUNT=10000 (threads stay awake for half a millisecond) is not set. With two threads a token of full with
    # weight_prepack then takes 20 ms, where one thread takes 23, and a prompt 0.6 times as long. But a plain batched
    # forward gains a quarter by it and the trunk's ragged one nothing, which is not understood.
    #
    # oneDNN computes bfloat16, packed weights and, with float32_matmul_precision "medium", float32 products. It caches
    # a primitive for each number of tokens and each shape of weights: 0.8 MB each, 1024 of them by default, and torch
    # caches 1024 more for each thread. One takes 0.8 ms to make; all layers of a forward use the same few. Prompts of
    # 160 lengths from 8 threads leave 100 MB with these limits, 650 without.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "8",
    "TOKENIZERS_PARALLELISM": "false",
    # gRPC's event engine, on by default for Python since 1.85, passes received data through a pool of threads: 27
    # wake-ups for a token in client and trunk. With the older poller the waiting thread reads the answer itself: 18
    # wake-ups. Wire time on loopback is 0.85 [0.77, 0.92] times as long (14 pairs); TPOT hardly shows it: 0.986
    # [0.966, 1.006] (45 pairs).
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    # Without it gRPC writes a line of its own on the terminal whenever a server closes an idle connection.
    "GRPC_VERBOSITY": "ERROR",
}


def set_defaults() -> None:
    """Set those of DEFAULTS that are not set yet, for this process and its children."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
