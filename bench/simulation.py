"""A discrete-event simulation of many clients of one or more trunk servers, in simulated seconds.

Clients, their requests and their figures are those of the load test, and a server decides by the scheduler's own
`next_batch` and `Pace`. Only time is simulated: what forwards, clients and links take is given by `Costs` and `Link`.
Each client has a link of its own and stays at one replica. A server passes one message at a time, as the threads of a
Python process share its lock; so the answers of one forward come one after another.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import simpy

from splitlearn.link.emulated import Link
from splitlearn.loadtest.driver import Measurement, Outcome
from splitlearn.loadtest.plan import LoadRequest, LoadTest, load_requests
from splitlearn.loadtest.summary import Summary
from splitlearn.scheduling.scheduler import Limits, QueueEntry, Turns, next_batch
from splitlearn.scheduling.sessions import Pace

Points = Sequence[tuple[int, float]]
"""Numbers of tokens, rising, with the seconds of each."""
Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Costs:
    """Measured seconds: of a forward with one token of so many sessions (`decode`), of one with so many tokens of a
    prompt (`prompt`), of all that a step takes beside forward and link (`step_s`), of opening a session (`open_s`). A
    token has `row_bytes` on the wire."""

    decode: Points
    prompt: Points
    step_s: float
    open_s: float
    row_bytes: int

    def forward_s(self, decoding: int, prompt: int) -> float:
        """The seconds of a forward. One with both kinds of tokens reads the weights once."""
        if not prompt:
            return between(self.decode, decoding)
        if not decoding:
            return between(self.prompt, prompt)
        return between(self.decode, decoding) + between(self.prompt, prompt) - between(self.decode, 1)


def between(points: Points, at: float) -> float:
    """The value at `at` on the straight lines through `points`; beyond them, on the first or the last line."""
    lines = list(pairwise(points))
    (x0, y0), (x1, y1) = next((line for line in lines if at <= line[1][0]), lines[-1])
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


@dataclass(eq=False)
class Session:
    """A session at a replica."""

    pace: Pace = field(default_factory=Pace)
    busy: bool = False


@dataclass(eq=False, kw_only=True)
class SimulatedStep(QueueEntry):
    """A step in a replica's queue."""

    session: Session
    ended: simpy.Event


class Replica:
    """A trunk server: one forward at a time, chosen as the engine chooses it (scheduling/engine.py). `messages` is its
    process, as far as that passes messages."""

    def __init__(self, env: simpy.Environment, costs: Costs, limits: Limits) -> None:
        self._env, self._costs, self._limits = env, costs, limits
        self._sessions: set[Session] = set()
        self._waiting: list[SimulatedStep] = []
        self._arrived = env.event()
        self._turns, self._forwards = Turns(), 0
        self.messages = simpy.Resource(env)
        env.process(self._run())

    def open(self) -> Session:
        session = Session()
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        self._sessions.remove(session)

    def step(self, session: Session, tokens: int) -> simpy.Event:
        """Queue a step of `tokens`. The event comes with its answer."""
        session.pace.stepped(self._env.now)
        session.busy = True
        step = SimulatedStep(group="all", holder=id(session), left=tokens, session=session, ended=self._env.event())
        self._waiting.append(step)
        self._arrived.succeed()
        self._arrived = self._env.event()
        return step.ended

    def _run(self) -> Events:
        while True:
            if not self._waiting:
                yield self._arrived
            yield from self._gather()
            batch = next_batch(self._waiting, self._limits, self._turns, awaited=bool(self._expected()))
            decoding = sum(step.left == 1 for step, _ in batch)
            prompt = sum(tokens for step, tokens in batch if step.left > 1)
            yield self._env.timeout(self._costs.forward_s(decoding, prompt))
            self._forwards += 1
            self._turns = self._turns.after(batch, self._forwards)
            for step, tokens in batch:
                self._computed(step, tokens)

    def _computed(self, step: SimulatedStep, tokens: int) -> None:
        step.ran, step.left = self._forwards, step.left - tokens
        if step.left:
            return
        self._waiting.remove(step)
        step.session.busy = False
        step.session.pace.answered(self._env.now)
        step.ended.succeed()

    def _gather(self) -> Events:
        """Wait for sessions whose next step is due, at most `gather_s`."""
        until = self._env.now + self._limits.gather_s
        while (left := self._awaited_until(until) - self._env.now) > 0:
            yield self._arrived | self._env.timeout(left)

    def _awaited_until(self, until: float) -> float:
        return min(until, max((pace.overdue_s for pace in self._expected() if pace.due_s < until), default=0.0))

    def _expected(self) -> list[Pace]:
        paces = (session.pace for session in self._sessions if not session.busy)
        return [pace for pace in paces if self._env.now < pace.overdue_s]


@dataclass(frozen=True)
class Scenario:
    """The closed loop `load` with prompts of `prompt_tokens`, shared by `replicas` servers behind links alike."""

    load: LoadTest
    prompt_tokens: Sequence[int]
    link: Link
    replicas: int = 1


def simulate(scenario: Scenario, costs: Costs, limits: Limits) -> Summary:
    """The figures of a load, as the load test would measure them."""
    env: Any = simpy.Environment()
    replicas = [Replica(env, costs, limits) for _ in range(scenario.replicas)]
    found: list[Outcome] = []
    for number in range(scenario.load.clients):
        wire = Wire(env, scenario.link, costs, replicas[number % len(replicas)])
        env.process(_client(env, scenario, number, wire, found))
    env.run()  # until the last answer has ended, as the load test waits for it
    found.sort(key=lambda outcome: outcome.arrived_s)
    return Summary.of(Measurement(tuple(found), scenario.load.duration_s, busy=0.0), scenario.load.levels)


@dataclass(frozen=True)
class Wire:
    """What is between a client and its replica. Each of the two takes a quarter of a step's `step_s` for the message
    there, and a quarter for the one back."""

    env: simpy.Environment
    link: Link
    costs: Costs
    replica: Replica

    def sent(self, tokens: int) -> Events:
        """The seconds from the client to the replica's queue."""
        yield self.env.timeout(self.costs.step_s / 4 + self.link.up.expected_s(tokens * self.costs.row_bytes))
        yield from self._passed()

    def returned(self, tokens: int) -> Events:
        """The seconds from the replica to the client."""
        yield from self._passed()
        yield self.env.timeout(self.link.down.expected_s(tokens * self.costs.row_bytes) + self.costs.step_s / 4)

    def _passed(self) -> Events:
        with self.replica.messages.request() as turn:
            yield turn
            yield self.env.timeout(self.costs.step_s / 4)


def _client(env: simpy.Environment, scenario: Scenario, number: int, wire: Wire, found: list[Outcome]) -> Events:
    for job in load_requests(scenario.load, number):
        if env.now >= scenario.load.duration_s:
            return
        began, times = env.now, list[float]()
        yield from _answer(env, scenario, job, wire, times)
        found.append(Outcome(number, job, began, began, env.now, "done", "", tuple(times)))
        yield env.timeout(scenario.link.rtt_ms / 1e3)  # the client ends its session in order


def _answer(env: simpy.Environment, scenario: Scenario, job: LoadRequest, wire: Wire, times: list[float]) -> Events:
    """One request: open a session, send the prompt, and then each token once the answer to the last one is there."""
    session = wire.replica.open()
    yield env.timeout(wire.costs.open_s + scenario.link.rtt_ms / 1e3)
    tokens = scenario.prompt_tokens[job.prompt]
    for _ in range(job.new_tokens):
        yield from wire.sent(tokens)
        yield wire.replica.step(session, tokens)
        yield from wire.returned(tokens)
        times.append(env.now)
        tokens = 1
    wire.replica.close(session)
