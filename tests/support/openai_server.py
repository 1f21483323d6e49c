"""`splitlearn serve` for tests: the OpenAI protocol on a free port, in a process of its own."""

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from splitlearn.cli import main as command_line
from tests.support.forks import Fork
from tests.support.trunk import eventually

START_S = 240.0
USED = "low_cpu_mem_usage,use_cache,output_attentions,float32_matmul_precision,weight_prepack"
"""Flags with which the server's own workers answer."""


@contextmanager
def serve(
    model: str,
    folder: Path,
    verify: ssl.SSLContext | bool = True,
    flags: str = "default",
    **settings: Mapping[str, Any],
) -> Iterator[str]:
    """The address, without /v1, of a server of `model` whose arms are loaded. `folder` gets its files. It must end in
    order. `verify` is what its certificate is checked with."""
    whole: dict[str, Any] = {"model": {"name": model}, "flags": flags, "runs": {"threads": 1}, **settings}
    whole["api"] = {"port": 0, **whole.get("api", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    server = Fork(command_line.main, ["serve", "--config", str(folder / "config.yaml")], folder, folder / "errors")
    try:
        found = re.search(r"(https?://)\S+(:\d+)(?=/v1)", server.stdout.readline())
        assert found is not None, (folder / "errors").read_text(encoding="utf-8")
        address = f"{found[1]}localhost{found[2]}"
        assert eventually(lambda: httpx.get(f"{address}/health", verify=verify).status_code == 200, START_S)
        yield address
        server.terminate()
        assert server.wait(START_S) == 0
    finally:
        server.close()
    assert "Traceback" not in (folder / "errors").read_text(encoding="utf-8")
