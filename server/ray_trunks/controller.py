"""The controller: keeps as many replicas of each link as are wanted, and tells the directory where they are.

It runs in a process of its own, in a session of its own: signals of the terminal reach neither it nor the Ray that it
starts. Its parent tells it to drain, or closes the pipe.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from server.monitoring import logs
from server.ray_trunks import scaling
from server.ray_trunks.directory import Entry
from server.ray_trunks.directory_handle import DirectoryHandle
from server.ray_trunks.failures import Failures
from server.ray_trunks.ray_api import Lost, Ray
from server.ray_trunks.replica import ANY, Replica, Report
from server.ray_trunks.scaling import Bounds, Decision
from splitlearn.address import joined
from splitlearn.config import RAY_SCHEME, Config, SplitConfig
from splitlearn.errors import SetupError, as_error

LOOK_S = 0.25
DRAIN_SPARE_S = 30.0
"""How much longer than server.drain_s a drain may take before the actor is killed."""
log = logging.getLogger("server")


def work(connection: Connection, settings: Config, address: str, level: int) -> None:
    """The main function of the controller's process. It sends the directory's address, or the error that keeps it from
    starting; it goes on until its parent sends anything, which is to drain first, or closes the connection."""
    logs.start(level)
    try:
        ray = Ray(address, settings.ray)
    except Exception as error:
        connection.send(as_error(error, "starting Ray"))
        return
    try:
        controller = Controller(ray, settings)
        if _until(connection, controller.begin()):
            connection.send(controller.address)
            _until(connection, controller.steps())
        if _asked(connection):
            _until(connection, controller.drain())
    except Exception as error:
        connection.send(as_error(error, "running trunks on Ray"))
    finally:
        ray.close()


def _until(connection: Connection, steps: Iterator[None]) -> bool:
    """Whether all of `steps` are done before the parent has something to say."""
    return not any(connection.poll() for _ in steps)


def _asked(connection: Connection) -> bool:
    """Whether the parent has sent a message; False if it has closed the connection."""
    try:
        return bool(connection.recv())
    except (EOFError, OSError):
        return False


@dataclass(eq=False)
class Running:
    """A replica: its link, actor and placement group. `slot` is its place in the group that all links begin with; None
    if the group is its own. `call` asks for its report."""

    link: int
    actor: Any
    group: Any
    slot: int | None
    state: str = "starting"
    report: Report = Report()
    call: Any = None
    end_by: float = math.inf

    def entry(self) -> Entry:
        """What the directory is told of it."""
        found = self.report
        return Entry(self.link, self.state, found.address, found.layers, found.load)


@dataclass
class Link:
    """A link of the chain, and what was decided of its number of replicas."""

    number: int
    settings: Config
    decision: Decision
    failures: Failures = field(default_factory=Failures)


class Controller:
    """The replicas on `ray`. `begin` and `steps` are iterators, so that between two steps the caller may stop."""

    def __init__(self, ray: Ray, settings: Config) -> None:
        self._ray, self._settings = ray, settings
        ours = settings.ray
        self._bounds = Bounds(ours.min_replicas, ours.max_replicas, ours.idle_s)
        links = [_of_link(settings, each) for each in ours.layers or (None,)]
        self._links = [Link(number, each, Decision(0)) for number, each in enumerate(links, 1)]
        self._replicas: list[Running] = []
        self._started = 0
        self._group = self._all_groups()
        self._directory = DirectoryHandle(ray, settings.server, len(links))

    @property
    def address(self) -> str:
        """Where the directory is: ray://host:port."""
        server = self._settings.server
        host = self._ray.here if server.host in ANY else server.host
        return RAY_SCHEME + joined(host, self._directory.port)

    def begin(self) -> Iterator[None]:
        """Start the least replicas of each link, and wait until they serve. Raises SetupError if one cannot."""
        while not self._ray.placed(self._group, LOOK_S):
            yield
        while not self._serving():
            self._step()
            for link in self._links:
                if link.failures.count:
                    raise SetupError(f"A trunk server on Ray did not start. {link.failures.last}")
            yield

    def steps(self) -> Iterator[None]:
        """Look after the replicas for ever."""
        while True:
            self._step()
            yield

    def drain(self) -> Iterator[None]:
        """Let all replicas end when their sessions have."""
        logs.info(log, "draining", replicas=len(self._replicas), at_most_s=self._settings.server.drain_s)
        for replica in self._replicas:
            replica.state = "draining"
        self._tell()
        for replica in self._replicas:
            self._drain(replica)
        while self._replicas:
            self._look()
            yield

    def _step(self) -> None:
        self._look()
        for link in self._links:
            self._scale(link)
        self._tell()

    def _look(self) -> None:
        """Take the reports that have come, for at most LOOK_S, and ask for the next ones."""
        calls = {}
        for replica in self._replicas:
            replica.call = replica.call or self._ray.call(replica.actor, "report")
            calls[replica.call] = replica
        began = time.monotonic()
        done = self._ray.answered(list(calls), LOOK_S) if calls else []
        for call in done:
            replica, calls[call].call = calls[call], None
            self._note(replica, self._ray.result(call))
        for replica in [each for each in self._replicas if time.monotonic() > each.end_by]:
            self._remove(replica, "it did not drain in time")
        time.sleep(max(0.0, LOOK_S - (time.monotonic() - began)))

    def _note(self, replica: Running, found: Report | Lost) -> None:
        """Take a report, or that there is none."""
        failures = self._links[replica.link - 1].failures
        if isinstance(found, Lost):
            if found.dead:
                self._remove(replica, "its actor died")
            elif replica.state != "draining":
                replica.state, replica.report = "starting", Report()
        elif found.failed:
            failures.add(found.failed)
            self._remove(replica, found.failed)
        elif found.ended:
            self._remove(replica)
        else:
            if replica.state == "starting" and found.layers[1]:
                logs.info(log, "replica", link=replica.link, address=found.address, pid=found.pid)
                replica.state, failures.count = "serving", 0
            replica.report = found

    def _scale(self, link: Link) -> None:
        """Start or drain a replica, if the loads say so."""
        own = [each for each in self._replicas if each.link == link.number and each.state != "draining"]
        loads = [each.report.load for each in own if each.state == "serving"]
        now = time.monotonic()
        link.decision = scaling.decide(loads, len(own) - len(loads), self._bounds, now, link.decision)
        if link.decision.wanted > len(own) and now >= link.failures.until:
            for _ in range(link.decision.wanted - len(own)):
                self._start(link)
        elif link.decision.wanted < len(own):
            spare = [each for each in own if each.slot is None and each.state == "serving"]
            for replica in sorted(spare, key=lambda each: each.report.load.sessions)[:1]:
                replica.state = "draining"
                self._tell()  # first, so that no client is sent there any more
                self._drain(replica)

    def _start(self, link: Link) -> None:
        """Start a replica: in its link's next place of the first group, or in a group of its own."""
        least = self._bounds.least
        slots = range((link.number - 1) * least, link.number * least)
        free = [each for each in slots if each not in [replica.slot for replica in self._replicas]]
        slot = free[0] if free else None
        group = self._ray.group(1) if slot is None else self._group
        self._started += 1
        name = f"link-{link.number}-replica-{self._started}"
        actor = self._ray.replica(Replica, name, group, slot or 0, link.settings)
        self._replicas.append(Running(link.number, actor, group, slot))
        logs.info(log, "starting", replica=name)

    def _drain(self, replica: Running) -> None:
        """Let a replica end when its sessions have."""
        replica.end_by = time.monotonic() + self._settings.server.drain_s + DRAIN_SPARE_S
        self._ray.call(replica.actor, "drain")

    def _remove(self, replica: Running, why: str = "") -> None:
        """End a replica that serves no more."""
        self._replicas.remove(replica)
        self._ray.kill(replica.actor)
        if replica.slot is None:
            self._ray.remove(replica.group)
        if why:
            log.warning("replica ended", extra={"fields": {"link": replica.link, "why": why}})

    def _tell(self) -> None:
        """Tell the directory where the replicas are."""
        self._directory.tell([each.entry() for each in self._replicas])

    def _serving(self) -> bool:
        counts = [0] * len(self._links)
        for replica in self._replicas:
            counts[replica.link - 1] += replica.state == "serving"
        return min(counts) >= self._bounds.least

    def _all_groups(self) -> Any:
        """The placement group of the replicas that are always there. Raises SetupError if a Ray of our own, which gets
        no more nodes, has no room for them."""
        count = len(self._links) * self._bounds.least
        have: dict[str, float] = {}
        for node in self._ray.nodes():
            have = {name: have.get(name, 0.0) + amount for name, amount in node.items()}
        for name, amount in self._ray.bundle().items():
            if self._ray.local and count * amount > have.get(name, 0.0):
                short = f"{count} of them need {name} {count * amount:g}, this machine has {have.get(name, 0.0):g}"
                raise SetupError(f"ray: there is no room for {count} trunk servers: {short}.")
        return self._ray.group(count)


def _of_link(settings: Config, layers: Sequence[int] | None) -> Config:
    """The settings of a replica with `layers`: on any port, with metrics for its actor alone."""
    server = settings.server.model_copy(update={"port": 0, "metrics_host": "127.0.0.1", "metrics_port": 0})
    split = settings.split if layers is None else SplitConfig(start=layers[0], end=layers[1])
    return settings.model_copy(update={"server": server, "split": split})
