"""From a configuration to what a worker of an arm is told (`ArmSpec`): reads the model, finds or starts the trunk and
parses the flags. runs.py runs the arms.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from splitlearn.arms.model import Model
from splitlearn.arms.spec import ArmSpec, Kind
from splitlearn.arms.trunk_pool import TrunkPool
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.hop import Hop, hops_at, hops_of
from splitlearn.client.served import with_trunk
from splitlearn.config import AUTO, Config, has_directory
from splitlearn.errors import InputError
from splitlearn.flags.registry import SIDES, Place
from splitlearn.flags.selection import Availability, FlagSet, availability
from splitlearn.flags.selection import check as check_flags
from splitlearn.flags.selection import parse as parse_flags
from splitlearn.link import words
from splitlearn.link.emulated import NONE as NO_LINK
from splitlearn.link.emulated import Link
from splitlearn.link.route import Routes
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import cgroups, ray_installed
from splitlearn.runtime.progress import Progress
from splitlearn.wire import channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

# Memory that must be left, in sizes of the model's weights, before one more process is kept: it may load a second copy.
WEIGHTS_FREE = 6


@dataclass(frozen=True)
class Settled:
    """Settings with a cut. `why` says in a sentence why it is this one; empty for one that was configured."""

    config: Config
    why: str = ""


Settle = Callable[[Config, Progress], Settled]
"""Plans the cut of settings with `split: auto` (planning/auto.py)."""


class Setup:
    """The setup of one configuration. Nothing is read before `read_model`, and no trunk is started before its address
    is asked for. Any thread may ask. `settle` plans the cut where the configuration says `split: auto`; without it that
    is an InputError."""

    def __init__(self, config: Config, progress: Progress, settle: Settle | None = None) -> None:
        self.config, self._settle = config, settle
        if config.trunk.on_ray:
            ray_installed.check("trunk.address")
        self.link = words.parse(config.trunk.link or NO_LINK, "trunk.link")
        self._progress = progress
        self._reading = threading.Lock()
        self._model: Model | None = None
        self._trunks = TrunkPool(config, self._has_memory)
        self._routes = Routes()

    @property
    def model(self) -> Model:
        """The configured model, read when it is first asked for. Raises as `read_model`."""
        return self.read_model()

    def read_model(self) -> Model:
        """Read the configured model, once; another thread that asks waits. Raises InputError and ModelError."""
        with self._reading:
            if self._model is None:
                config, self._model = self.settled_model(self.config, self._progress)
                if config != self.config:
                    self._change(config, self._model).close()
            return self._model

    def settled_model(self, config: Config, progress: Progress) -> tuple[Config, Model]:
        """The model of `config`, and these settings with a cut. Raises as `read_model`, and TrunkError for `split:
        auto` where no trunk server can be used."""
        settled = Settled(config) if self._settle is None or config.split != AUTO else self._settle(config, progress)
        return settled.config, replace(Model.read(settled.config, progress), why=settled.why)

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

    def hops(self, applied: frozenset[str] | None = None) -> tuple[Hop, ...]:
        """The way through the trunk: one hop, or several of a chain. `applied` are the trunk's flags, None for any.

        Starts the embedded trunk that has these flags, where there is none yet. Raises InputError for credentials that
        cannot be used.
        """
        if not self.config.trunk.embedded:
            return self._hops
        if applied is None:
            latest = self._trunks.latest
            applied = self._first_flags if latest is None else latest
        return hops_at((self._trunks.address(applied),), self.plan)

    @cached_property
    def _hops(self) -> tuple[Hop, ...]:
        plan = self.plan  # reading the model may settle other addresses
        return hops_of(self.config.trunk, plan)

    def trunk_addresses(self) -> tuple[str, ...]:
        """Where trunks listen, in the order of preference; of a chain, those of the first hop."""
        return self.hops()[0].listed()

    @property
    def _first_flags(self) -> frozenset[str]:
        """The trunk's flags of the configuration."""
        return parse_flags(self.config.flags, self.availability_here).trunk

    def trunk_address(self) -> str:
        """Where a trunk answers: the first address that there is, or the first of several that works. Of a chain, that
        of the first hop."""
        return self.hops()[0].address()

    def check_trunk(self) -> None:
        """Raise TrunkError unless a trunk answers and serves what this configuration needs."""
        served = self.spec("full", FlagSet()).served()
        for hop in self.hops():
            hop.check(served)

    def availability(self) -> Availability:
        """Which flags can be applied where: here for full and client; for the trunk, what its server says."""
        return with_trunk(self.availability_here, *self.describe_trunks())

    @property
    def availability_here(self) -> Availability:
        """Which flags can be applied in processes of this machine; without a look at the trunk server."""
        return availability(dict.fromkeys(SIDES, self.here))

    def describe_trunk(self) -> pb.Description:
        """What the trunk says that it serves; of a chain, its first server. Raises TrunkError."""
        return self.hops()[0].describe()

    def describe_trunks(self) -> list[pb.Description]:
        """What each server of the trunk says that it serves. Raises TrunkError."""
        return [hop.describe() for hop in self.hops()]

    @cached_property
    def credentials(self) -> Credentials:
        """What is shown to the trunk, of a chain unless a link says otherwise; the embedded one is on loopback and asks
        for nothing. Raises InputError."""
        return NONE if self.config.trunk.embedded else channel.credentials(self.config.trunk)

    def flags(self, text: str) -> FlagSet:
        """The flags that a person asked for in words. Raises InputError."""
        check_flags(text)
        return parse_flags(text, self.availability())

    def ready_spec(self, kind: Kind, flags: FlagSet, link: Link | None = None) -> ArmSpec:
        """What a worker of this arm is told. Starts the embedded trunk of a split arm first, where it does not run, and
        what emulates `link` (None: the configured one)."""
        if kind == "full":
            return self.spec(kind, flags)
        over = self.link if link is None else link
        hops = [self._over(over, hop) for hop in self.hops(flags.trunk)]
        return self.spec(kind, flags, tuple(hops))

    def _over(self, link: Link, hop: Hop) -> Hop:
        """`hop` over the emulated `link`."""
        if link != Link() and has_directory(hop.addresses):
            raise InputError("trunk.link", str(link), "none: no link is emulated to trunk servers on Ray")
        return replace(hop, via=self._routes.over(link, hop.addresses))

    def spec(self, kind: Kind, flags: FlagSet, hops: tuple[Hop, ...] = ()) -> ArmSpec:
        """What a worker of this arm is told; `hops` lead to its trunk."""
        return ArmSpec.of(kind, self.config, self.files, self.plan, self.device, flags, hops, self.model.draft)

    def check_cut(self, plan: SplitPlan) -> None:
        """Raise InputError for a cut that a remote trunk does not serve."""
        fixed = self.config.ray.layers if self.config.trunk.on_ray else not self.config.trunk.embedded
        if plan != self.plan and fixed:
            serves = f"{self.plan.start}:{self.plan.end}, the layers that the trunk server has"
            raise InputError("cut", f"{plan.start}:{plan.end}", serves)

    def pids(self) -> list[int]:
        """The processes of the embedded trunks that run."""
        return self._trunks.pids()

    def close(self) -> None:
        """End the emulated links and the embedded trunks."""
        self._routes.close()
        self._trunks.close()

    def _change(self, config: Config, model: Model) -> TrunkPool:
        """From now on, the setup of `config` with its `model`. Returns the trunks before, which the caller closes."""
        before = self._trunks
        self.config, self._model = config, model
        self._trunks = TrunkPool(config, self._has_memory)
        return before

    def _has_memory(self) -> bool:
        """Whether there is memory for another process with a part of the model."""
        return cgroups.available_memory() > WEIGHTS_FREE * self.files.weights.stat().st_size
