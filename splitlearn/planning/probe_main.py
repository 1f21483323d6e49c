"""The child process behind `probe.ask`: it runs a few sessions of random hidden states at a server."""

import time
from multiprocessing.connection import Connection

import torch

from splitlearn.client.remote_stage import RemoteStage
from splitlearn.errors import as_error
from splitlearn.flags.registry import settings
from splitlearn.planning.probe import REPEATS, STEPS, TIMEOUT_S, Request, Waits
from splitlearn.stages.base import StageInput
from splitlearn.wire import codec

SCALE = 0.1
"""Of random hidden states, about that of embeddings."""


def answer(connection: Connection, request: Request) -> None:
    """Send the Waits, or the error."""
    try:
        connection.send(waits_at(request))
    except Exception as error:
        connection.send(as_error(error, "asking the trunk server"))


def waits_at(request: Request) -> Waits:
    """What a client waits at the server, the least of a few sessions; the first one only warms both sides up."""
    stage = RemoteStage([request.address], request.served, TIMEOUT_S, request.credentials)
    try:
        found = [_session(stage, request) for _ in range(1 + REPEATS)][1:]
    finally:
        stage.close()
    rows = settings(request.flags).session.rows(codec.DTYPES[request.served.dtype])
    return Waits(min(first for first, _ in found), min(step for _, step in found), rows.row_bytes(_hidden(request)))


def _session(stage: RemoteStage, request: Request) -> tuple[float, float]:
    """The seconds of a prompt, and the least of a token."""
    session = stage.open(settings(request.flags).session, request.prompt_tokens + STEPS)
    try:
        seconds = []
        for position in (0, *range(request.prompt_tokens, request.prompt_tokens + STEPS)):
            tokens = 1 if position else request.prompt_tokens
            x = SCALE * torch.randn(1, tokens, _hidden(request), dtype=codec.DTYPES[request.served.dtype])
            started = time.perf_counter()
            stage.step([StageInput(session, position, x)])
            seconds.append(time.perf_counter() - started)
        return seconds[0], min(seconds[1:])
    finally:
        session.close()


def _hidden(request: Request) -> int:
    return request.served.hidden_size
