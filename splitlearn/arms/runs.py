"""The composition root: from a configuration to arms that run in worker processes.

    with Runs(config, progress) as runs:
        for item in runs.stream("split", flags, request): ...      # events, and an ArmReport at the end

One arm runs at a time, since two at once on one machine measure each other. Arms that differ only in session flags
share a worker. Workers stay loaded, up to `runs.warm_workers` or as memory allows, and have run a few tokens with an
arm's flags before anything of it is counted.
"""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from splitlearn.arms.model import Model
from splitlearn.arms.report import ArmReport, Item, Restart
from splitlearn.arms.spec import ArmEnd, ArmSpec, CandidatesRequest, Kind, TokenCandidates
from splitlearn.arms.trunk_pool import TrunkPool
from splitlearn.arms.worker import Message, Worker, compile_seconds
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import check_served, describe, first_that_works, with_trunk
from splitlearn.config import Config, SplitConfig
from splitlearn.errors import InputError, WorkFailed
from splitlearn.events import Event, GenerationRequest
from splitlearn.flags.registry import SIDES, Place
from splitlearn.flags.selection import Availability, FlagSet, availability
from splitlearn.flags.selection import check as check_flags
from splitlearn.flags.selection import parse as parse_flags
from splitlearn.link import words
from splitlearn.link.emulated import NONE as NO_LINK
from splitlearn.link.emulated import Link
from splitlearn.link.route import Routes
from splitlearn.metrics import RunMetrics, of_samples
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import cgroups
from splitlearn.runtime.process_pool import ProcessPool
from splitlearn.runtime.progress import Progress
from splitlearn.wire import channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

CLOSE_TIMEOUT_S = 3.0
MOST_RESTARTS = 20
ASIDE = "A trunk that others use may go on recording for them: leave cuda_graph out there (trunk: in --flags)."
# Memory that must be left, in sizes of the model's weights, before one more worker is kept: it may load a second copy.
WEIGHTS_FREE = 6


class Runs:
    """Runs arms of one configuration. Nothing is read before `read_model`, with which the context begins."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config = config
        self.link = words.parse(config.trunk.link or NO_LINK, "trunk.link")
        self._progress = progress
        self._reading = threading.Lock()
        self._model: Model | None = None
        self._lock = threading.Lock()
        self._workers = ProcessPool[ArmSpec, Worker](self._has_room)
        self._trunks = TrunkPool(config, self._has_memory)
        self._routes = Routes()

    def __enter__(self) -> "Runs":
        try:
            self.read_model()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> Model:
        """The configured model, read when it is first asked for. Raises as `read_model`."""
        return self.read_model()

    def read_model(self) -> Model:
        """Read the configured model, once; another thread that asks waits. Raises InputError and ModelError."""
        with self._reading:
            if self._model is None:
                self._model = Model.read(self.config, self._progress)
            return self._model

    @property
    def files(self) -> ModelFiles:
        """The model's files."""
        return self.model.files

    @property
    def plan(self) -> SplitPlan:
        """How the model is split."""
        return self.model.plan

    @property
    def here(self) -> Place:
        """What decides which flags can be applied in processes of this machine."""
        return self.model.capabilities.place

    @property
    def device(self) -> str:
        """Where the arms compute, by torch's name."""
        return self.here.device

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations, by torch's name."""
        return self.config.model.dtype

    @property
    def busy(self) -> bool:
        """Whether an arm runs now."""
        return self._lock.locked()

    def trunk_addresses(self, applied: frozenset[str] | None = None) -> tuple[str, ...]:
        """Where trunks listen, in the order of preference. `applied` are the trunk's flags, None for any.

        Starts the embedded trunk that has these flags, where there is none yet.
        """
        if not self.config.trunk.embedded:
            return self.config.trunk.address
        if applied is None:
            latest = self._trunks.latest
            applied = self._first_flags if latest is None else latest
        return (self._trunks.address(applied),)

    @property
    def _first_flags(self) -> frozenset[str]:
        """The trunk's flags of the configuration."""
        return parse_flags(self.config.flags, self.availability_here).trunk

    def trunk_address(self) -> str:
        """Where a trunk answers: the first address that there is, or the first of several that works."""
        first, *others = self.trunk_addresses()
        return first_that_works((first, *others), self._answering) if others else first

    def _answering(self, address: str) -> str:
        """`address`, if a trunk answers there."""
        describe(address, self.credentials)
        return address

    def check_trunk(self) -> None:
        """Raise TrunkError unless a trunk answers and serves what this configuration needs."""
        served, shown = self.spec("full", FlagSet()).served(), self.credentials
        first_that_works(
            self.trunk_addresses(), lambda address: check_served(describe(address, shown), served, address)
        )

    def availability(self) -> Availability:
        """Which flags can be applied where: here for full and client; for the trunk, what its server says."""
        return with_trunk(self.availability_here, self.describe_trunk())

    @property
    def availability_here(self) -> Availability:
        """Which flags can be applied in processes of this machine; without a look at the trunk server."""
        return availability(dict.fromkeys(SIDES, self.here))

    def describe_trunk(self) -> pb.Description:
        """What the trunk says that it serves. Raises TrunkError."""
        return describe(self.trunk_address(), self.credentials)

    @cached_property
    def credentials(self) -> Credentials:
        """What is shown to the trunk; the embedded one is on loopback and asks for nothing. Raises InputError."""
        return NONE if self.config.trunk.embedded else channel.credentials(self.config.trunk)

    def flags(self, text: str) -> FlagSet:
        """The flags that a person asked for in words. Raises InputError."""
        check_flags(text)
        return parse_flags(text, self.availability())

    def stream(
        self,
        kind: Kind,
        flags: FlagSet,
        request: GenerationRequest,
        cancelled: threading.Event | None = None,
        copy: int = 0,
        link: Link | None = None,
    ) -> Iterator[Item]:
        """Run one arm: its events as they come, then its report. Each `copy` of the same arm has a worker of its own.
        A split arm's trunk is behind the emulated `link`, None for the configured one.

        A run in which something was compiled is no measurement: it is repeated until nothing is, and its time counts
        as compile time. Raises WorkFailed after MOST_RESTARTS of them. Closing the iterator, or setting `cancelled`,
        ends the run.
        """
        stop = cancelled or threading.Event()
        with self._lock:
            link = self.link if link is None else link
            spec = replace(self.ready_spec(kind, flags, link), copy=copy)
            try:
                worker = self._warm_worker(spec, request, stop)
                if worker is not None:
                    yield from self._measure(spec, worker, request, stop, link)
            except BaseException:
                self._workers.prune()  # the next run has new ones
                raise

    def candidates(
        self,
        kind: Kind,
        asked: CandidatesRequest,
        cancelled: threading.Event | None = None,
        link: Link | None = None,
    ) -> TokenCandidates:
        """The candidates for a token of an answer, which the arm generates again, as far as that token.

        Nothing in it when `cancelled` was set. Raises as `stream`.
        """
        stop = cancelled or threading.Event()
        with self._lock:
            try:
                spec = self.ready_spec(kind, asked.flags, link)
                worker = self._warm_worker(spec, asked.request, stop)
                return (
                    TokenCandidates() if worker is None else worker.candidates(replace(asked, flags=spec.flags), stop)
                )
            except BaseException:
                self._workers.prune()
                raise

    def warm(self, kind: Kind, flags: FlagSet, request: GenerationRequest, stop: threading.Event) -> bool:
        """Load the worker of this arm and let it generate a few tokens, as `stream` does before what counts.

        False when there is no memory to keep it beside the others, or `stop` was set. Raises as `stream`.
        """
        with self._lock:
            if len(self._workers) and not self._workers.has_room():
                return False
            try:
                return self._warm_worker(self.ready_spec(kind, flags), request, stop) is not None
            except BaseException:
                self._workers.prune()
                raise

    def check_cut(self, plan: SplitPlan) -> None:
        """Raise InputError for a cut that a remote trunk does not serve."""
        if plan != self.plan and not self.config.trunk.embedded:
            serves = f"{self.plan.start}:{self.plan.end}, the layers that the trunk server has"
            raise InputError("cut", f"{plan.start}:{plan.end}", serves)

    def split_at(self, plan: SplitPlan) -> None:
        """Cut the model there from the next run on; waits for one that is under way. All arms are loaded anew.

        Raises InputError for a cut that a remote trunk does not serve.
        """
        self.check_cut(plan)
        if plan != self.plan:
            split = SplitConfig(start=plan.start, end=plan.end)
            self.use(self.config.model_copy(update={"split": split}), replace(self.model, plan=plan))

    def use(self, config: Config, model: Model) -> None:
        """Run `model`, which was read with the settings `config`, from the next run on; waits for one that is under
        way. All arms are loaded anew, and the embedded trunk. Only for one that is embedded."""
        with self._lock:
            before = self._trunks
            self.config, self._model = config, model
            self._trunks = TrunkPool(config, self._has_memory)
            self._workers.close()
            before.close()

    def pids(self) -> list[int]:
        """The processes of the arms and embedded trunks that are loaded."""
        return [*(worker.child.pid for worker in self._workers), *self._trunks.pids()]

    def _warm_worker(self, spec: ArmSpec, request: GenerationRequest, stop: threading.Event) -> Worker | None:
        """The worker of `spec`, loaded and warm. None when `stop` was set before."""
        loaded = spec.loaded()
        worker = self._workers.obtain(loaded, lambda: Worker.start(loaded, stop))
        if worker is not None:
            worker.warm_up(spec.flags, request, stop)
        return None if stop.is_set() else worker

    def close(self) -> None:
        """End all workers and the embedded trunk; a run that another thread has under way gets a moment to end."""
        self._lock.acquire(timeout=CLOSE_TIMEOUT_S)
        self._workers.close()
        self._routes.close()
        self._trunks.close()

    def ready_spec(self, kind: Kind, flags: FlagSet, link: Link | None = None) -> ArmSpec:
        """What a worker of this arm is told. Starts the embedded trunk of a split arm first, where it does not run, and
        what emulates `link` (None: the configured one)."""
        if kind == "full":
            return self.spec(kind, flags)
        addresses = self.trunk_addresses(flags.trunk)
        via = self._routes.over(self.link if link is None else link, addresses)
        return replace(self.spec(kind, flags, addresses), via=via)

    def spec(self, kind: Kind, flags: FlagSet, addresses: tuple[str, ...] = ()) -> ArmSpec:
        """What a worker of this arm is told; `addresses` are those of its trunk."""
        shown = self.credentials if kind == "split" else NONE
        return ArmSpec.of(
            kind, self.config, self.files, self.plan, self.device, flags, addresses, shown, self.model.draft
        )

    def _has_room(self, count: int) -> bool:
        """Whether another worker may be kept beside `count` of them."""
        most = self.config.runs.warm_workers
        return self._has_memory() if most is None else count < most

    def _has_memory(self) -> bool:
        """Whether there is memory for another process with a part of the model."""
        return cgroups.available_memory() > WEIGHTS_FREE * self.files.weights.stat().st_size

    def _measure(
        self, spec: ArmSpec, worker: Worker, request: GenerationRequest, stop: threading.Event, link: Link
    ) -> Iterator[Item]:
        """The run that counts, and those before it in which something was compiled."""
        for restarts in itertools.count():
            seen: list[Message] = []
            for item in worker.generate(spec.flags, request, stop):
                seen.append(item)
                if not isinstance(item, ArmEnd):
                    yield item
            compiled = compile_seconds(seen)
            worker.compile_s[spec.flags] += compiled
            found = of_samples((item for item in seen if isinstance(item, Event)), request.samples)
            if compiled and not stop.is_set():
                if restarts == MOST_RESTARTS:
                    raise WorkFailed(f"{1 + restarts} runs in a row compiled something: nothing is measured. {ASIDE}")
                yield Restart()
                continue
            end = next((item for item in seen if isinstance(item, ArmEnd)), None)
            if found and end is not None:
                yield replace(self._report(spec, worker, found, end), link=link if spec.via else Link())
            return

    def _report(self, spec: ArmSpec, worker: Worker, found: tuple[RunMetrics, ...], end: ArmEnd) -> ArmReport:
        return ArmReport(
            kind=spec.kind,
            metrics=found[0],
            load_s=worker.ready.load_s,
            compile_s=worker.compile_s[spec.flags],
            import_rss_bytes=worker.ready.import_rss_bytes,
            peak_rss_bytes=end.peak_rss_bytes,
            dtype=self.dtype,
            device=spec.device,
            threads=worker.ready.threads,
            trunk_address=end.trunk.address if end.trunk else None,
            trunk=end.trunk,
            kv_bytes_per_token=self.model.trunk_kv_bytes() if spec.kind == "split" else 0,
            texts=end.texts,
            others=found[1:],
        )
