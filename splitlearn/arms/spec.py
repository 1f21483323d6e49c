"""What a worker process is told and what it sends back: records alone, so that the page's process can read them
without torch."""

from dataclasses import dataclass, replace

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import Served, TrunkFacts
from splitlearn.config import Config
from splitlearn.events import Kind as Kind
from splitlearn.flags.registry import SIDES, of_scope
from splitlearn.flags.selection import FlagSet
from splitlearn.models.plan import SplitPlan
from splitlearn.wire.channel import NONE, Credentials

CANCEL = "cancel"


@dataclass(frozen=True)
class ArmSpec:
    """All that a worker needs to know. `device` and `dtype` are torch's names. `addresses` are the trunk's, none for
    the full arm, and `via` where to connect for each of them over an emulated link; `draft` is the model that drafts,
    where the flags ask for one; `copy` tells apart workers that are otherwise the same."""

    kind: Kind
    files: ModelFiles
    plan: SplitPlan
    device: str
    dtype: str
    threads: int | None
    flags: FlagSet
    addresses: tuple[str, ...]
    timeout_s: float
    credentials: Credentials = NONE
    draft: ModelFiles | None = None
    copy: int = 0
    via: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        kind: Kind,
        config: Config,
        files: ModelFiles,
        plan: SplitPlan,
        device: str,
        flags: FlagSet,
        addresses: tuple[str, ...] = (),
        credentials: Credentials = NONE,
        draft: ModelFiles | None = None,
    ) -> "ArmSpec":
        """The arm `kind` of `config`, with the `flags` of its sides; only the split arm shows the `credentials`."""
        split = kind == "split"
        return cls(
            kind,
            files,
            plan,
            device,
            config.model.dtype,
            config.runs.threads,
            replace(flags, full=frozenset()) if split else FlagSet(full=flags.full),
            addresses,
            config.trunk.timeout_s,
            credentials if split else NONE,
            draft,
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.files.digest, self.flags, self.addresses, self.copy, self.via))

    def loaded(self) -> "ArmSpec":
        """What the worker process is started with: without session flags, which each generation brings. Arms that
        differ in nothing else share a process."""
        kept = {side: of_scope(self.flags.of(side), "load", "process") for side in SIDES}
        return replace(self, flags=FlagSet(**kept))

    def served(self) -> Served:
        """What the trunk must serve."""
        return Served(self.files.name, self.files.digest, self.plan, self.dtype, self.files.facts.hidden_size)


@dataclass(frozen=True)
class ArmReady:
    """A worker has loaded its stages: seconds that it took, and what its imports alone hold in memory."""

    load_s: float
    import_rss_bytes: int
    threads: int


@dataclass(frozen=True)
class Texts:
    """What a generation's token ids stand for. `prompt` is what the model saw, in pieces, each with whether it is a
    control token; `tokens` has the text of each token alone, for each sample."""

    prompt: tuple[tuple[str, bool], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class ArmEnd:
    """A generation is over: the worker's peak memory so far, what the trunk said of itself (None for full), and the
    texts of its tokens."""

    peak_rss_bytes: int
    trunk: TrunkFacts | None
    texts: Texts = Texts()
