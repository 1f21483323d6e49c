"""Serves metrics over HTTP, for Prometheus."""

import prometheus_client

from server.monitoring.metrics import Metrics
from splitlearn import address
from splitlearn.config import ServerConfig
from splitlearn.errors import SetupError
from splitlearn.runtime import ports


def listen(metrics: Metrics, settings: ServerConfig) -> str | None:
    """Serve the metrics over HTTP. Returns the address, None without a port. Raises SetupError if it cannot listen."""
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
