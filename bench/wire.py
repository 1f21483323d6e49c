"""The wire's share of a step, against an echo server that is sent the same bytes in the same run.

After the client's bottom, each decode step asks the trunk and the echo server, in random order. The echo server keeps a
message for as long as the trunk computes (it sleeps) and says how long it kept it, so that both round trips are taken
from a process that waited as long.
"""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from statistics import fmean, median
from typing import Any

import grpc
import torch

from bench.report import write
from splitlearn import loading, process
from splitlearn.compare import environment
from splitlearn.generate import Feed
from splitlearn.lab.stats import effect
from splitlearn.remote import RemoteStage
from splitlearn.runs import Runs
from splitlearn.tokens import Tokens

ROUNDS = 12
STEPS = 64
FLAGS = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states"
METHOD = "/echo/Echo"
PROMPT = "What is the capital of France?"


def main(runs: Runs) -> None:
    """Measure and write docs/results/wire.md."""
    child = process.start("The echo server", _serve)
    address: str = child.receive()
    try:
        pairs = [_round(runs, address, random.Random(number)) for number in range(ROUNDS)]
    finally:
        child.stop()
    wires, echoes = zip(*pairs, strict=True)
    found = effect(wires, echoes)
    rows = [
        {"wire of the trunk, ms": f"{fmean(wires) * 1e3:.3f}", "echo, ms": f"{fmean(echoes) * 1e3:.3f}", "ratio": found}
    ]
    text = f"Medians per step of {ROUNDS} rounds of {STEPS} decoded tokens; ratio of the rounds with its 95% interval."
    write("wire", "The wire against an echo server", text, rows, environment(runs))


def _round(runs: Runs, address: str, order: random.Random) -> tuple[float, float]:
    """The median wire and echo time of one generation's steps, in seconds."""
    flags = runs.flags(FLAGS)
    spec = runs.spec("split", flags)
    loading.prepare_process(flags.client, spec.threads)
    placement = loading.Placement(spec.device, spec.dtype)
    stages = loading.load(spec.files, loading.client_specs(spec.plan), flags.client, placement).stages
    trunk = RemoteStage(spec.addresses, spec.served(), spec.timeout_s)
    feeds = [Feed(stage, stage.open(flags.client, 256)) for stage in (stages[0], stages[1])]
    remote = Feed(trunk, trunk.open(flags.trunk, 256))
    echo = _Echo(address)
    ids = Tokens.load(spec.files.folder, use_fast=True).encode(PROMPT, chat=True)
    wires: list[float] = []
    echoes: list[float] = []
    position, held = 0, 0.05
    for _ in range(STEPS):
        start, bottom = feeds[0].step(position, torch.tensor([ids[position:]]))
        position = len(ids)
        first = order.random() < 0.5
        if first:
            echoes.append(echo.step(bottom.x[:, -1:], held))
        start, output = remote.step(start, bottom.x)
        ledger = output.timing.ledger
        wires.append(ledger["wire"])
        held = ledger["trunk"]
        if not first:
            echoes.append(echo.step(bottom.x[:, -1:], held))
        _, top = feeds[1].step(start, output.x)
        ids.append(int(top.x[0, -1].argmax()))
    echo.close()
    remote.session.close()
    trunk.close()
    return median(wires[1:]), median(echoes[1:])


class _Echo:
    """A stream to the echo server."""

    def __init__(self, address: str) -> None:
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        method: Any = self._channel.stream_stream(METHOD)
        self._call = method(iter(self._outgoing.get, None))

    def step(self, x: torch.Tensor, hold_s: float) -> float:
        """Send a trunk step's bytes and get them back; the round trip less what the server kept them, in seconds."""
        message = x.contiguous().numpy().tobytes().ljust(2327, b"\0")
        started = time.perf_counter()
        self._outgoing.put(b"%12.9f" % hold_s + message[12:])
        reply = next(self._call)
        return time.perf_counter() - started - float(reply[:12])

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def _serve(connection: Connection) -> None:
    """The echo server's process."""

    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in requests:
            started = time.perf_counter()
            time.sleep(float(message[:12]))
            yield b"%12.9f" % (time.perf_counter() - started) + message[12:]

    handler = grpc.method_handlers_generic_handler("echo", {"Echo": grpc.stream_stream_rpc_method_handler(echo)})
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(f"127.0.0.1:{port}")
    threading.Event().wait()
