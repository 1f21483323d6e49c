"""The composition root: from a configuration to arms that run in worker processes.

    with Runs(config, progress) as runs:
        for item in runs.stream("split", flags, request): ...      # events, and an ArmReport at the end

One arm runs at a time, since two at once on one machine measure each other; only `serve` answers many at once. Arms
that differ only in session flags share a worker. Workers stay loaded, up to `runs.warm_workers` or as memory allows,
and have run a few tokens with an arm's flags before anything of it is counted.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from splitlearn.arms.model import Model
from splitlearn.arms.report import ArmReport, Item, Restart
from splitlearn.arms.setup import Settle, Setup
from splitlearn.arms.spec import ArmEnd, ArmSpec, CandidatesRequest, Kind, TokenCandidates
from splitlearn.arms.worker import Message, Worker, compile_seconds
from splitlearn.config import Config, with_cut
from splitlearn.errors import WorkFailed
from splitlearn.events import Event, GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics, of_samples
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.process_pool import ProcessPool
from splitlearn.runtime.progress import Progress
from splitlearn.runtime.shared_lock import SharedLock

CLOSE_TIMEOUT_S = 3.0
MOST_RESTARTS = 20
ASIDE = "A trunk that others use may go on recording for them: leave cuda_graph out there (trunk: in --flags)."


class Runs(Setup):
    """Runs arms of one configuration. Nothing is read before `read_model`, with which the context begins."""

    def __init__(self, config: Config, progress: Progress, settle: Settle | None = None) -> None:
        super().__init__(config, progress, settle)
        self._lock = SharedLock()
        self._starting, self._pool = threading.Lock(), threading.Lock()
        self._workers = ProcessPool[ArmSpec, Worker](self._has_room)

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
    def busy(self) -> bool:
        """Whether an arm runs now."""
        return self._lock.locked()

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

    def serve(
        self,
        kind: Kind,
        flags: FlagSet,
        request: GenerationRequest,
        stop: threading.Event,
        holder: str = "",
        batch: bool = False,
    ) -> Iterator[Event | ArmReport]:
        """Run a request beside others of this method: its events as they come, then its report.

        Steps of several requests share forwards, and nothing is measured: no run is repeated. While an arm is measured
        (`stream`), requests wait. `holder` is whom the request counts for; requests that are not `batch` come
        first where memory is short. Closing the iterator, or setting `stop`,
        ends the run. Raises what the run raises.
        """
        with self._lock.shared(), ExitStack() as stack:
            spec, events = self.ready_spec(kind, flags), list[Event]()
            worker = self._enter_worker(spec.loaded(), stop)
            if worker is None:
                return
            stack.callback(self._leave_worker, worker)
            for item in worker.exchange.ask(spec.flags, request, holder, stop, batch):
                if isinstance(item, ArmEnd):
                    found = of_samples(events, request.samples)
                    yield replace(self._report(spec, worker, found, item), link=self.link if spec.emulated else Link())
                else:
                    events.append(item)
                    yield item

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

    def split_at(self, plan: SplitPlan) -> None:
        """Cut the model there from the next run on; waits for one that is under way. All arms are loaded anew.

        Raises InputError for a cut that a remote trunk does not serve.
        """
        self.check_cut(plan)
        if plan != self.plan:
            self.use(with_cut(self.config, plan.start, plan.end), replace(self.model, plan=plan, why=""))

    def use(self, config: Config, model: Model) -> None:
        """Run `model`, which was read with the settings `config`, from the next run on; waits for one that is under
        way. All arms are loaded anew, and the embedded trunk. Only for one that is embedded."""
        with self._lock:
            before = self._change(config, model)
            self._workers.close()
            before.close()

    def pids(self) -> list[int]:
        """The processes of the arms and embedded trunks that are loaded."""
        return [*(worker.child.pid for worker in self._workers), *super().pids()]

    def _warm_worker(self, spec: ArmSpec, request: GenerationRequest, stop: threading.Event) -> Worker | None:
        """The worker of `spec`, loaded and warm. None when `stop` was set before."""
        loaded = spec.loaded()
        worker = self._workers.obtain(loaded, lambda: Worker.start(loaded, stop))
        if worker is not None:
            worker.warm_up(spec.flags, request, stop)
        return None if stop.is_set() else worker

    def _enter_worker(self, loaded: ArmSpec, stop: threading.Event) -> Worker | None:
        """The worker of `loaded`, for one of several requests. While it starts, requests to other workers go on. None
        when `stop` was set before it had."""
        with self._pool:
            worker = self._workers.get(loaded)
            if worker is not None:
                worker.users += 1
                return worker
        with self._starting:
            self._start(loaded, stop)
        return None if stop.is_set() else self._enter_worker(loaded, stop)

    def _start(self, loaded: ArmSpec, stop: threading.Event) -> None:
        """Start the worker of `loaded`, where it is not there, and add it to the pool."""
        with self._pool:
            if self._workers.get(loaded) is not None:
                return
            going = list(iter(self._evict, None))
        for worker in going:
            worker.stop()
        started = Worker.start(loaded, stop)
        if started is not None:
            with self._pool:
                self._workers.add(loaded, started)

    def _evict(self) -> Worker | None:
        return None if self._workers.has_room() else self._workers.evict()

    def _leave_worker(self, worker: Worker) -> None:
        with self._pool:
            worker.users -= 1
            self._workers.prune()  # the next request has a new one

    def close(self) -> None:
        """End all workers and the embedded trunk; a run that another thread has under way gets a moment to end."""
        self._lock.acquire(CLOSE_TIMEOUT_S)
        self._workers.close()
        super().close()

    def _has_room(self, count: int) -> bool:
        """Whether another worker may be kept beside `count` of them."""
        most = self.config.runs.warm_workers
        return self._has_memory() if most is None else count < most

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
                yield replace(self._report(spec, worker, found, end), link=link if spec.emulated else Link())
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
            hops=end.hops if len(end.hops) > 1 else (),
            kv_bytes_per_token=self.model.trunk_kv_bytes() if spec.kind == "split" else 0,
            texts=end.texts,
            others=found[1:],
        )
