"""A real trunk server process for tests, and a client that can send it anything.

`serve(config, folder)` starts one on a free port, waits until it is ready, and ends it. `Raw` is a session's stream
without client code between the test and the wire.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any

import grpc
import psutil
import torch
import yaml

from server.__main__ import main
from server.auth.tls import Security
from server.build import TrunkRuntime, build
from server.program import listen
from server.service import TrunkService
from server.variants import Variants
from splitlearn import config
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import ServedModel
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.progress import Progress, silent
from splitlearn.wire import PROTOCOL, READY, SERVICE, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.hidden_states import Plain, Rows
from tests.support import ROOT
from tests.support.forks import Fork

PLAN = SplitPlan(2, 4, 6)
ANSWER_TIMEOUT_S = 600.0
RAW = Plain(torch.float32)


def settings(files: ModelFiles, **sections: Mapping[str, object]) -> dict[str, Any]:
    """The settings of a config.yaml that runs `files` on one thread, updated by `sections`."""
    usual: dict[str, Any] = {"model": {"name": str(files.folder), "device": "cpu"}, "runs": {"threads": 1}}
    usual |= {"flags": "trunk:none", "server": {"drain_s": 0}}
    return {**usual, **{name: {**usual.get(name, {}), **section} for name, section in sections.items()}}


@dataclass(frozen=True)
class Trunk:
    """A running server. `errors` is the file with its stderr."""

    process: subprocess.Popen[str] | Fork
    address: str
    errors: Path

    def variants(self) -> list[psutil.Process]:
        """Its servers for other sets of flags."""
        return forks_of(self.process.pid)


def start(config: Mapping[str, Any], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `python -m server` with `config`, written to a file in `folder`. Its stderr goes to server.err there."""
    command = [sys.executable, "-m", "server", "--config", str(_written(config, folder)), *arguments]
    with (folder / "server.err").open("w") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def _written(config: Mapping[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    return path


@contextmanager
def serve(config: Mapping[str, Any], folder: Path, port: int = 0, fresh: bool = False) -> Iterator[Trunk]:
    """A ready server for a `with` block. It is stopped at the end, together with its variants.

    It is forked from a process that has its imports. `fresh` starts `python -m server` as a person does, which takes
    seconds more.
    """
    if fresh:
        process: subprocess.Popen[str] | Fork = start(config, folder, "--port", str(port))
    else:
        arguments = ["--config", str(_written(config, folder)), "--port", str(port)]
        process = Fork(main, arguments, ROOT, folder / "server.err")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(READY), (folder / "server.err").read_text()
        yield Trunk(process, line.removeprefix(READY).strip(), folder / "server.err")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()


@dataclass(frozen=True)
class TrunkHere:
    """A server in this process, so that a test can inspect it."""

    address: str
    runtime: TrunkRuntime


@contextmanager
def serve_here(
    files: ModelFiles,
    flags: str = "trunk:none",
    prefixes: Mapping[str, object] = MappingProxyType({}),
    layers: tuple[int, int] = (PLAN.start, PLAN.end),
    /,
    **limits: object,
) -> Iterator[TrunkHere]:
    """Run the real server on a real socket in this process, with the trunk's `flags` and settings of `prefix_cache`."""
    start, end = layers
    own = settings(files, split={"start": start, "end": end}, server={"port": 0, **limits}, prefix_cache=prefixes)
    with run_here(config.parse({**own, "flags": flags})) as running:
        yield running


@contextmanager
def run_here(parsed: config.Config, progress: Progress = silent) -> Iterator[TrunkHere]:
    """As `serve_here`, with these settings."""
    built = build(parsed, progress)
    variants = Variants(parsed, built)
    security = Security.of(parsed.server)
    service = TrunkService(built, variants, parsed.server, security)
    running = listen(service, parsed.server, security)
    try:
        yield TrunkHere(running.address, built)
    finally:
        running.server.stop(grace=0).wait()
        security.next_servers.stop()
        variants.stop()


def eventually(holds: Callable[[], object], within_s: float = 60.0) -> bool:
    """Whether `holds()` becomes true within `within_s`."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def served(files: ModelFiles, plan: SplitPlan = PLAN) -> ServedModel:
    """The requirements of a client whose trunk serves `files`."""
    return ServedModel(files.name, files.digest, plan, "float32", files.facts.hidden_size)


def opening(files: ModelFiles, plan: SplitPlan = PLAN, **changes: Any) -> bytes:
    """The Open message that such a trunk accepts, updated by `changes`."""
    right: dict[str, Any] = {
        "protocol": PROTOCOL,
        "model": files.name,
        "digest": files.digest,
        "start": plan.start,
        "end": plan.end,
        "n_layers": plan.n_layers,
        "dtype": "float32",
        "max_length": 64,
        "flags": ["use_cache", "inference_mode"],
    }
    return pb.ClientMessage(open=pb.Open(**{**right, **changes})).SerializeToString()


def hidden(files: ModelFiles, tokens: int, seed: int = 0) -> torch.Tensor:
    """A random hidden state [1, tokens, H]."""
    return torch.randn(1, tokens, files.facts.hidden_size, generator=torch.Generator().manual_seed(seed))


def encoded(x: torch.Tensor, rows: Rows | None = None) -> pb.Tensor:
    """`x` [1, T, H] in the form `rows` of the wire, by default in its own dtype."""
    rows = rows or Plain(x.dtype)
    return pb.Tensor(**codec.fields(rows.to_bytes(x), rows, x.shape[2]))


def step(x: torch.Tensor | pb.Tensor, position: int, step_id: int = 1, **changes: Any) -> bytes:
    """A Step message of `x` at `position`."""
    tensor = x if isinstance(x, pb.Tensor) else encoded(x)
    message = pb.Step(sequence_id=1, step_id=step_id, position=position, hidden=tensor, **changes)
    return pb.ClientMessage(step=message).SerializeToString()


class Raw:
    """One session's stream. `ask` sends bytes and waits for a reply, `refusal` for the status that ends the stream."""

    def __init__(self, address: str, credentials: Credentials = NONE) -> None:
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = open_channel(address, credentials)
        method: Any = self._channel.stream_stream(f"/{SERVICE}/Session")
        self._call = method(iter(self._outgoing.get, None), timeout=ANSWER_TIMEOUT_S, wait_for_ready=True)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def send(self, *messages: bytes) -> None:
        """Send without waiting."""
        for message in messages:
            self._outgoing.put(message)

    def receive(self) -> pb.ServerMessage:
        """The next reply."""
        return pb.ServerMessage.FromString(next(self._call))

    def ask(self, *messages: bytes) -> pb.ServerMessage:
        """Send, and wait for one reply."""
        self.send(*messages)
        return self.receive()

    def refusal(self, *messages: bytes) -> tuple[grpc.StatusCode, str]:
        """Send, and wait for the error that the stream ends with."""
        self.send(*messages)
        try:
            reply = self.receive()
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code(), failed.details()
        raise AssertionError(f"accepted: {reply}")

    def end(self) -> pb.ServerMessage:
        """Close the sending side, and wait for the last reply."""
        self._outgoing.put(None)
        return self.receive()

    def cancel(self) -> None:
        """Cancel the stream."""
        self._call.cancel()
        self._outgoing.put(None)
        self._channel.close()


def tensor_of(reply: pb.ServerMessage, files: ModelFiles) -> torch.Tensor:
    """The hidden state in a step's answer."""
    return RAW.from_bytes(reply.result.hidden.data, files.facts.hidden_size)


def forks_of(pid: int | None = None) -> list[psutil.Process]:
    """The children of the fork servers of this process, or of `pid`: workers and trunk servers."""
    return [grandchild for child in psutil.Process(pid).children() for grandchild in child.children()]


def listens(process: psutil.Process) -> bool:
    """Whether it listens on a TCP port. Among a program's processes only trunk servers do."""
    with suppress(psutil.NoSuchProcess):
        return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))
    return False


def gone(pid: int) -> bool:
    """Whether no such process runs. A zombie counts as gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, in which the checkout can be imported from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}
