"""Ten families over a real gRPC socket: the split model's tokens are the full model's.

The server is the real one, in this process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import Stage
from splitlearn.stages.local import LocalStage
from tests.conftest import TinyFactory
from tests.stages.test_proof import TEN
from tests.support.trunk import PLAN, serve_here, served
from tests.support.words import generation_of, load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode"})
UNCACHED = frozenset({"inference_mode"})
# Left to itself, a tiny random model with a tied head says the last token again and again.
GREEDY = SamplingParams(repetition_penalty=1.5)
SEEDED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
PROMPT = "The sky is blue because air scatters short waves of light more than long ones."


@dataclass(frozen=True)
class Model:
    """A tiny model, its full stage, the client's stages, and the trunk that serves the rest."""

    files: ModelFiles
    full: LocalStage
    client: tuple[Stage, ...]
    trunk: RemoteStage

    def split(self, at_client: frozenset[str], at_trunk: frozenset[str]) -> list[Link]:
        bottom, *rest = self.client
        return [
            Link(bottom, session_of(at_client)),
            Link(self.trunk, session_of(at_trunk)),
            *(Link(stage, session_of(at_client)) for stage in rest),
        ]

    def run(self, links: list[Link], sampling: SamplingParams) -> list[int]:
        """The 12 token ids of one generation."""
        tokens = Tokens.load(self.files.folder, use_fast=True)
        generator = Generator(links, tokens, None, generation_of(CACHED))
        request = GenerationRequest(PROMPT, max_new_tokens=12, ignore_eos=True, sampling=sampling)
        return [
            token for event in generator.stream(request) if isinstance(event, TokenEvent) for token in event.token_ids
        ]


@contextmanager
def running(files: ModelFiles, applied: frozenset[str] = frozenset(), **limits: object) -> Iterator[Model]:
    """The model's stages, loaded with the flags `applied`, with its trunk behind a socket."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    full = loading.load(files, loading.full_specs(files.n_layers), load_of(applied), placement).stages[0]
    client = loading.load(files, loading.client_specs(PLAN), load_of(applied), placement).chain
    with serve_here(files, f"trunk:{','.join(applied) or 'none'}", **limits) as here:
        trunk = RemoteStage([here.address], served(files), timeout_s=30)
        yield Model(files, full, client, trunk)
        trunk.close()


@pytest.mark.parametrize("family", TEN)
def test_split_over_a_socket_gives_the_tokens_of_the_full_model(family: str, tiny_model: TinyFactory) -> None:
    with running(tiny_model(family)) as model:
        for sampling in (GREEDY, SEEDED):
            wanted = model.run([Link(model.full, session_of(CACHED))], sampling)
            assert len(set(wanted)) > 2, "a model that repeats itself shows little"
            for at_client, at_trunk in ((CACHED, CACHED), (CACHED, UNCACHED), (UNCACHED, CACHED)):
                assert model.run(model.split(at_client, at_trunk), sampling) == wanted
