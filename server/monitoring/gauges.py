"""Connects the Prometheus gauges to the running server."""

import platform

import grpc
import torch
import transformers

from server.build import TrunkRuntime
from server.monitoring.prefix_metrics import PrefixCollector
from server.variants import Variants
from splitlearn.config import ServerConfig
from splitlearn.wire import PROTOCOL


def connect(runtime: TrunkRuntime, variants: Variants, limits: ServerConfig) -> None:
    """Connect the gauges to the runtime and set the build info."""
    engine, admission = runtime.engine, runtime.admission
    runtime.metrics.show(
        {
            "sessions": lambda: admission.sessions,
            "sessions_limit": lambda: limits.max_sessions,
            "sessions_waiting": lambda: admission.waiting,
            "sessions_waiting_limit": lambda: limits.max_waiting,
            "sessions_proxied": lambda: variants.sessions,
            "steps_waiting": lambda: engine.waiting,
            "kv_blocks_used": lambda: admission.pool.blocks_used,
            "kv_blocks": lambda: admission.pool.n_blocks,
        },
        build_info(runtime),
    )
    runtime.metrics.registry.register(PrefixCollector(lambda: runtime.prefixes.store))


def build_info(runtime: TrunkRuntime) -> dict[str, str]:
    """What is served, and the versions of what serves it."""
    plan = runtime.plan
    return {
        "model": runtime.files.name,
        "layers": f"{plan.start}-{plan.end} of {plan.n_layers}",
        "dtype": str(runtime.placement.dtype).removeprefix("torch."),
        "device": str(runtime.placement.device),
        "protocol": str(PROTOCOL),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "grpc": grpc.__version__,
    }
