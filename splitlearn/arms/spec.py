"""The records that go to a worker process and come back. The page's process reads them without torch."""

from dataclasses import dataclass, replace

from splitlearn.checkpoints.catalogue import with_folder
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.hop import Hop
from splitlearn.client.served import ServedModel, TrunkFacts
from splitlearn.config import Config, PrefixCacheConfig, has_directory
from splitlearn.errors import SplitlearnError
from splitlearn.events import Candidate, Event, GenerationRequest
from splitlearn.events import Kind as Kind
from splitlearn.flags.registry import SIDES, of_scope
from splitlearn.flags.selection import FlagSet
from splitlearn.models.plan import SplitPlan

CANCEL = "cancel"


@dataclass(frozen=True)
class ArmSpec:
    """All that a worker needs to know. `device` and `dtype` are torch's names. `hops` lead to the trunk, several to a
    chain of servers, none in the full arm. `draft` is the draft model, if one is configured. `copy` tells apart workers
    that are otherwise the same. `kv_bytes` limits the KV memory of generations at once, None to a share of what is
    free. `verify` is the share of the trunk's answers to check. `forward`: the servers of a chain pass their answers on
    themselves."""

    kind: Kind
    files: ModelFiles
    plan: SplitPlan
    device: str
    dtype: str
    threads: int | None
    flags: FlagSet
    hops: tuple[Hop, ...]
    timeout_s: float
    draft: ModelFiles | None = None
    copy: int = 0
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    kv_bytes: int | None = None
    verify: float = 0.0
    forward: bool = False

    @classmethod
    def of(
        cls,
        kind: Kind,
        config: Config,
        files: ModelFiles,
        plan: SplitPlan,
        device: str,
        flags: FlagSet,
        hops: tuple[Hop, ...] = (),
        draft: ModelFiles | None = None,
    ) -> "ArmSpec":
        """The arm `kind` of `config`, with the `flags` of its sides."""
        split = kind == "split"
        return cls(
            kind,
            files,
            plan,
            device,
            config.model.dtype,
            config.runs.threads,
            replace(flags, full=frozenset()) if split else FlagSet(full=flags.full),
            hops,
            config.trunk.timeout_s,
            draft,
            prefix_cache=with_folder(config.prefix_cache, config.model),
            kv_bytes=config.api.kv_bytes,
            verify=config.trunk.verify if split else 0.0,
            forward=config.trunk.forward and len(hops) > 1 and not any(has_directory(hop.addresses) for hop in hops),
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.files.digest, self.flags, self.hops, self.forward, self.copy))

    @property
    def emulated(self) -> bool:
        """Whether the way to the trunk is an emulated link."""
        return any(hop.via for hop in self.hops)

    def at(self, *addresses: str) -> "ArmSpec":
        """This with its trunk, which is one server, at other addresses."""
        (hop,) = self.hops
        return replace(self, hops=(replace(hop, addresses=addresses),))

    def loaded(self) -> "ArmSpec":
        """This without session flags, which each generation brings. Arms that differ only in those share a process."""
        kept = {side: of_scope(self.flags.of(side), "load", "process") for side in SIDES}
        return replace(self, flags=FlagSet(**kept))

    def served(self) -> ServedModel:
        """What the trunk must serve, of a chain all servers together."""
        return ServedModel(self.files.name, self.files.digest, self.plan, self.dtype, self.files.facts.hidden_size)


@dataclass(frozen=True)
class ArmReady:
    """A worker has loaded its stages: the seconds it took, and the memory that its imports alone hold."""

    load_s: float
    import_rss_bytes: int
    threads: int


@dataclass(frozen=True)
class CandidatesRequest:
    """Asks a worker for the likeliest candidates for token `at` of `sample` (both from 0) of the answer to `request`,
    and for the token ids `also`."""

    flags: FlagSet
    request: GenerationRequest
    sample: int
    at: int
    also: frozenset[int]


@dataclass(frozen=True)
class TokenCandidates:
    """`listed` by logit, highest first, and the token that the arm chose when it was run again (None for none)."""

    token_id: int | None = None
    listed: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Texts:
    """The text of a generation's token ids. `prompt` is what the model saw: runs of text and single control tokens,
    each with whether it is one. `tokens` has the text of each token alone, for each sample, and `prompt_tokens` that of
    the prompt's, as `prompt` has it."""

    prompt: tuple[tuple[str, bool], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()
    prompt_tokens: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class ArmEnd:
    """A generation is over: the worker's peak memory so far, what each server of the trunk said of itself (none for
    full), and the texts of its tokens."""

    peak_rss_bytes: int
    hops: tuple[TrunkFacts, ...]
    texts: Texts = Texts()

    @property
    def trunk(self) -> TrunkFacts | None:
        """What the trunk said of itself, of a chain all servers together; None for full."""
        return TrunkFacts.together(self.hops)


@dataclass(frozen=True)
class ServeRequest:
    """Asks a worker for one of several generations at once. `number` names it in all that is sent about it; `holder` is
    whom its sessions count for. `batch`: others come first."""

    number: int
    flags: FlagSet
    request: GenerationRequest
    holder: str = ""
    batch: bool = False


@dataclass(frozen=True)
class ServeCancel:
    """Ends the generation `number`."""

    number: int


Served = Event | ArmEnd | SplitlearnError


@dataclass(frozen=True)
class ServedItem:
    """What the generation `number` gave. An ArmEnd or an error is its last item."""

    number: int
    item: Served
