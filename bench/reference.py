"""transformers' own `generate()` in a worker process, with TTFT and TPOT as the arms define them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from splitlearn.arms.spec import ArmSpec
from splitlearn.generation.tokenizer import Tokens
from splitlearn.runtime import process
from splitlearn.stages import loading


@dataclass(frozen=True)
class Generated:
    """The new ids of one call, TTFT and TPOT in seconds."""

    token_ids: tuple[int, ...]
    ttft_s: float
    tpot_s: float


class _Clock:
    """A streamer. `generate()` calls `put` with the prompt, then with each new id once it is on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


class Reference:
    """The worker process. `run(prompt, count)` generates `count` tokens greedily and ignores the end token."""

    def __init__(self, spec: ArmSpec) -> None:
        self._child = process.start("The generate() worker process", _main, spec)

    def run(self, prompt: str, count: int, *, chat: bool = True) -> Generated:
        """One call of generate()."""
        self._child.send((prompt, count, chat))
        found: Generated = self._child.receive()
        return found

    def stop(self) -> None:
        """End the worker."""
        self._child.stop()


def _main(connection: Connection, spec: ArmSpec) -> None:
    loading.prepare_process(frozenset(), spec.threads)
    model = (
        AutoModelForCausalLM.from_pretrained(spec.files.folder, trust_remote_code=False, dtype=spec.dtype)
        .eval()
        .to(spec.device)
    )
    model.generation_config.eos_token_id = None
    tokens = Tokens.load(spec.files.folder, use_fast=True)
    while True:
        prompt, count, chat = connection.recv()
        connection.send(_generate(model, tokens.encode(prompt, chat=chat), count))


def _generate(model: Any, prompt_ids: Sequence[int], count: int) -> Generated:
    clock, started = _Clock(), time.perf_counter()
    ids = torch.tensor([prompt_ids], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, streamer=clock)
    first, last = clock.times[1], clock.times[-1]
    return Generated(tuple(out[0, ids.shape[1] :].tolist()), first - started, (last - first) / max(1, count - 1))
