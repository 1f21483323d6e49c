"""How this server is seen from outside: what its gauges are read from, and the port where Prometheus asks."""

import platform

import grpc
import prometheus_client
import torch
import transformers

from server.build import Served
from server.monitoring.metrics import Metrics
from server.variants import Others
from splitlearn import address
from splitlearn.config import ServerConfig
from splitlearn.errors import SetupError
from splitlearn.runtime import ports
from splitlearn.wire import PROTOCOL


def connect(served: Served, others: Others, limits: ServerConfig) -> None:
    """Let the gauges be read from what serves, and say what is served."""
    engine, admission = served.engine, served.admission
    served.metrics.show(
        {
            "sessions": lambda: admission.sessions,
            "sessions_limit": lambda: limits.max_sessions,
            "sessions_waiting": lambda: admission.waiting,
            "sessions_waiting_limit": lambda: limits.max_waiting,
            "sessions_handed_on": lambda: others.sessions,
            "steps_waiting": lambda: engine.waiting,
            "kv_blocks_used": lambda: admission.pool.blocks_used,
            "kv_blocks": lambda: admission.pool.n_blocks,
        },
        what(served),
    )


def what(served: Served) -> dict[str, str]:
    """What is served, and by which versions."""
    plan = served.plan
    return {
        "model": served.files.name,
        "layers": f"{plan.start}-{plan.end} of {plan.n_layers}",
        "dtype": str(served.placement.dtype).removeprefix("torch."),
        "device": str(served.placement.device),
        "protocol": str(PROTOCOL),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "grpc": grpc.__version__,
    }


def listen(metrics: Metrics, settings: ServerConfig) -> str | None:
    """Answer HTTP with the metrics; where, or None when no port is set. Raises SetupError when it cannot listen."""
    if settings.metrics_port is None:
        return None
    host = settings.metrics_host
    ports.check("server.metrics_", host, settings.metrics_port)
    try:
        server, _ = prometheus_client.start_http_server(settings.metrics_port, host, metrics.registry)
    except OSError as error:
        where = address.joined(host, settings.metrics_port)
        raise SetupError(f"server.metrics_host: cannot listen on {where}: {error.strerror}.") from error
    return address.joined(host, server.server_port)
