"""What the native libraries under torch and gRPC are told: they read it from the environment when they are loaded."""

import os

DEFAULTS = {
    # Client and trunk take turns on the same cores: a pool of threads that spins while it has nothing to do takes them
    # from the other side. With GNU OpenMP's own default split took 1.21 [1.17, 1.24] times full, so 1.10 [1.08, 1.12]
    # (6 and 12 pairs).
    "OMP_WAIT_POLICY": "PASSIVE",
    # With two threads and GOMP_SPINCOUNT=10000 beside it (half a millisecond awake before they sleep) a token of full
    # with weight_prepack takes 20 ms in place of 23 on one, and a prompt 0.6 times as long. It is not set: a plain
    # batched forward gains a quarter by it and the trunk's packed one nothing, which is not understood.
    # oneDNN, which computes bfloat16, packed weights and, with float32_matmul_precision "medium", float32 products,
    # keeps what it made for each shape: 0.8 MB for each number of tokens and each shape of weights, 1024 of them unless
    # told otherwise, and torch 1024 more for each thread. To make one takes 0.8 ms; all layers of a forward use the
    # same few. Prompts of 160 lengths from 8 threads leave 100 MB with these, 650 without.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "8",
    "TOKENIZERS_PARALLELISM": "false",
    # gRPC's event engine, which 1.85 has on for Python, hands what a connection brings from thread to thread of a pool:
    # 27 wake-ups of threads for a token in client and trunk, where the poller of before, with which the thread that
    # waits for an answer reads it, takes 18. Wire time on loopback 0.85 [0.77, 0.92] times (14 pairs), which in TPOT is
    # hardly seen: 0.986 [0.966, 1.006] (45 pairs).
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}


def tell() -> None:
    """Put what nobody has set into the environment, for this process and its children."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
