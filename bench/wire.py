"""The wire's share of a step, against an echo server that is sent the same bytes in the same run.

After the client's bottom, each decode step asks the trunk and two echo servers, in random order. Each keeps a message
for as long as the trunk computes and says how long it kept it, so that all round trips are taken from a process that
waited as long. One sleeps meanwhile; the other reads as much memory as the trunk does, since whoever has gone through
80 MB of weights has nothing of gRPC's code left in the processor's caches.
"""

import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
TRUNK, SLEEPS, READS = "trunk", "sleeps", "reads memory"
ECHOES = (SLEEPS, READS)
WEIGHTS_BYTES, READ = 80 << 20, 1 << 18
PROMPT = "What is the capital of France?"


def main(runs: Runs) -> None:
    """Measure and write docs/results/wire.md."""
    with ExitStack() as stack:
        addresses = dict[str, str]()
        for name in ECHOES:
            child = process.start("The echo server", _serve, name)
            stack.callback(child.stop)
            addresses[name] = child.receive()
        rounds = [_round(runs, addresses, random.Random(number)) for number in range(ROUNDS)]
    wires = [found[TRUNK] for found in rounds]
    rows = [
        {
            "echo server": name,
            "wire of the trunk, ms": f"{fmean(wires) * 1e3:.3f}",
            "echo, ms": f"{fmean(found[name] for found in rounds) * 1e3:.3f}",
            "ratio": effect(wires, [found[name] for found in rounds]),
        }
        for name in ECHOES
    ]
    text = f"Medians per step of {ROUNDS} rounds of {STEPS} decoded tokens; ratio of the rounds with its 95% interval."
    write("wire", "The wire against an echo server", text, rows, environment(runs))


def _round(runs: Runs, addresses: Mapping[str, str], order: random.Random) -> dict[str, float]:
    """The median wire and echo times of one generation's steps, in seconds."""
    flags = runs.flags(FLAGS)
    spec = runs.spec("split", flags)
    loading.prepare_process(flags.client, spec.threads)
    placement = loading.Placement(spec.device, spec.dtype)
    stages = loading.load(spec.files, loading.client_specs(spec.plan), flags.client, placement).stages
    trunk = RemoteStage(spec.addresses, spec.served(), spec.timeout_s)
    feeds = [Feed(stage, stage.open(flags.client, 256)) for stage in (stages[0], stages[1])]
    remote = Feed(trunk, trunk.open(flags.trunk, 256))
    echoes = {name: _Echo(address) for name, address in addresses.items()}
    ids = Tokens.load(spec.files.folder, use_fast=True).encode(PROMPT, chat=True)
    found: dict[str, list[float]] = {name: [] for name in (TRUNK, *ECHOES)}
    position, held = 0, 0.05
    for _ in range(STEPS):
        start, bottom = feeds[0].step(position, torch.tensor([ids[position:]]))
        position = len(ids)
        for name in order.sample(list(found), len(found)):
            if name == TRUNK:
                start, output = remote.step(start, bottom.x)
                found[TRUNK].append(output.timing.ledger["wire"])
            else:
                found[name].append(echoes[name].step(bottom.x[:, -1:], held))
        held = output.timing.ledger["trunk"]
        _, top = feeds[1].step(start, output.x)
        ids.append(int(top.x[0, -1].argmax()))
    for echo in echoes.values():
        echo.close()
    remote.session.close()
    trunk.close()
    return {name: median(times[1:]) for name, times in found.items()}


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


def _serve(connection: Connection, name: str) -> None:
    """The echo server's process."""
    torch.set_num_threads(1)
    memory = torch.zeros(WEIGHTS_BYTES // 4)

    def keep(seconds: float) -> None:
        if name == SLEEPS:
            time.sleep(seconds)
            return
        until, at = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            memory[at : at + READ].sum()
            at = (at + READ) % len(memory)

    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in requests:
            started = time.perf_counter()
            keep(float(message[:12]))
            yield b"%12.9f" % (time.perf_counter() - started) + message[12:]

    handler = grpc.method_handlers_generic_handler("echo", {"Echo": grpc.stream_stream_rpc_method_handler(echo)})
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(f"127.0.0.1:{port}")
    threading.Event().wait()
