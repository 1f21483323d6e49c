"""A load test of a trunk server, by clients that are split arms or replay one."""

from contextlib import AbstractContextManager

from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.cli.loadtest_run import Stopping
from splitlearn.config import Config
from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.loadtest.clients import Client
from splitlearn.loadtest.driver import drive
from splitlearn.loadtest.plan import LoadTest, check_lengths
from splitlearn.loadtest.recording import recordings_of
from splitlearn.loadtest.report import LoadTestResult
from splitlearn.loadtest.summary import Summary
from splitlearn.loadtest.trunk_clients import real_clients, replay_clients
from splitlearn.planning.auto import settle
from splitlearn.runtime import programs
from splitlearn.runtime.progress import Progress


def load_trunk(config: Config, asked: LoadTest, progress: Progress, stopping: Stopping) -> LoadTestResult:
    """Load the trunk of `config`. Raises InputError and TrunkError."""
    with Runs(config, progress, settle) as runs:
        return measure(runs, asked, progress, stopping)


def measure(runs: Runs, asked: LoadTest, progress: Progress, stopping: Stopping) -> LoadTestResult:
    """Check what is asked, start the clients, load the trunk. Raises InputError and TrunkError."""
    chat, facts, trunk = runs.config.generation.chat, runs.files.facts, runs.config.trunk
    if asked.replay and trunk.chain:
        expected = "one trunk server with --replay, which sends recorded hidden states to one; leave --replay out"
        raise InputError("trunk.address", trunk.place, expected)
    tokens = Tokens.load(runs.files.folder, use_fast=True)
    lengths = [(len(tokens.encode(text, chat)), new_tokens) for text, new_tokens in asked.largest()]
    if asked.turns > 1 and chat is False:
        raise InputError("turns", asked.turns, "1 with generation.chat: false: a conversation needs a chat template")
    prefix = len(tokens.encode(asked.prefix, chat=False)) if asked.prefix else 0
    check_lengths(lengths, asked.turns, facts.context_length, prefix)
    runs.check_trunk()
    spec = runs.ready_spec("split", runs.flags(runs.config.flags))
    with clients_for(spec, asked, chat, progress) as clients, stopping as stop:
        measured = drive(clients, asked, progress, stop)
    return LoadTestResult(
        load=asked,
        clients="replaying" if asked.replay else "real",
        prompt_tokens=tuple(prompt for prompt, _ in lengths),
        measurement=measured,
        summary=Summary.of(measured, asked.levels),
        model=runs.files.name,
        command=programs.this_command(),
        environment=environment(runs),
    )


def clients_for(
    spec: ArmSpec, asked: LoadTest, chat: bool | str, progress: Progress
) -> AbstractContextManager[list[Client]]:
    """The clients: real ones, or ones that replay a recording made now."""
    if not asked.replay:
        return real_clients(spec, asked, chat, progress)
    return replay_clients(spec, asked, recordings_of(asked, spec, chat, progress), progress)
