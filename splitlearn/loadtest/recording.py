"""Records what a client sends to its trunk: the hidden states of a prompt and of the tokens of its answer.

The trunk's work does not depend on the values. So a replay loads it as the client would, without the client's layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from splitlearn.arms import worker_main
from splitlearn.arms.spec import ArmSpec
from splitlearn.errors import SplitlearnError, as_error
from splitlearn.events import GenerationRequest
from splitlearn.flags.registry import settings
from splitlearn.loadtest.plan import LoadTest
from splitlearn.runtime import process
from splitlearn.runtime.progress import Progress, Step
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.codec import DTYPES
from splitlearn.wire.hidden_states import Plain


@dataclass(frozen=True)
class Recording:
    """`states` [1, T, H]: `prompt_tokens` rows of the prompt, then one for each token of the answer except the last."""

    prompt_tokens: int
    states: torch.Tensor

    def steps(self, new_tokens: int, use_cache: bool = True) -> Iterator[tuple[int, torch.Tensor]]:
        """The steps of an answer of `new_tokens` tokens: the position and the hidden state [1, T, H] of each.

        Without `use_cache` each step has the whole prefix.
        """
        yield 0, self.states[:, : self.prompt_tokens]
        for position in range(self.prompt_tokens, self.prompt_tokens + new_tokens - 1):
            first = position if use_cache else 0
            yield first, self.states[:, first : position + 1]


def record(spec: ArmSpec, requests: Sequence[GenerationRequest], progress: Progress) -> list[Recording]:
    """Run each request once through a split client in a child process, with the trunk of `spec`.

    Raises the client's errors.
    """
    child = process.start("The recording client's worker process", _main, spec, tuple(requests))
    try:
        made = []
        for count in range(len(requests)):
            progress(Step("Recording hidden states", count, len(requests)))
            item = child.receive()
            if isinstance(item, SplitlearnError):
                raise item
            prompt_tokens, data = item
            states = Plain(DTYPES[spec.dtype]).from_bytes(data, spec.files.facts.hidden_size)
            made.append(Recording(prompt_tokens, states))
        return made
    finally:
        child.stop()


def recordings_of(load: LoadTest, spec: ArmSpec, chat: bool | str, progress: Progress) -> list[Recording]:
    """A recording of each prompt with the longest answer of `load`."""
    requests = [GenerationRequest(prompt, load.longest_answer, chat=chat, ignore_eos=True) for prompt in load.texts()]
    return record(spec, requests, progress)


class _Recorder:
    """The bottom stage, which also keeps its hidden state for each position."""

    def __init__(self, stage: LocalStage) -> None:
        self._stage = stage
        self.states = torch.empty(0)
        self.prompt_tokens = 0

    def open(self, settings: SessionSettings, max_length: int) -> LocalSession:
        """Open a session and begin a recording."""
        self.states, self.prompt_tokens = torch.empty(0), 0
        return self._stage.open(settings, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The stage's step. The first one of a session is its prompt."""
        outputs = self._stage.step(batch)
        for item, output in zip(batch, outputs, strict=True):
            self.states = torch.cat([self.states[:, : item.position], output.x], dim=1) if item.position else output.x
            self.prompt_tokens = self.prompt_tokens or output.x.shape[1]
        return outputs


def _main(connection: Connection, spec: ArmSpec, requests: Sequence[GenerationRequest]) -> None:
    """The recording process: sends (prompt tokens, raw values) for each request, or an error."""
    try:
        own = settings(spec.flags.client)
        loading.prepare_process(own.process, spec.threads)
        placement = loading.Placement.of(spec.device, spec.dtype)
        loaded = loading.load(spec.files, loading.client_specs(spec.plan), own.load, placement)
        recorder = _Recorder(loaded.stages[0])
        generator = worker_main.generator(
            spec, (recorder, *loaded.chain[1:]), worker_main.open_trunks(spec), worker_main.read_tokens(spec)
        )
        for request in requests:
            for _ in generator.stream(request):
                pass
            connection.send((recorder.prompt_tokens, Plain(DTYPES[spec.dtype]).to_bytes(recorder.states)))
    except Exception as error:
        connection.send(as_error(error, "recording hidden states"))
