"""What a plan over several machines is made from: the work of a model's layers, the machines, the links between them.

Records alone; every figure in them was measured or given (planning/devices.py, docs/planning.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from splitlearn.errors import InputError
from splitlearn.link.emulated import Link, Way
from splitlearn.planning.anatomy import Anatomy, kv_values
from splitlearn.planning.costs import layer_bytes, units

MESSAGE_BYTES = 70
"""Around the hidden state in a message, with its frames."""
CLIENT = 0
"""The first device of a network: it has the bottom, the top and the LM head."""


@dataclass(frozen=True)
class Device:
    """A machine. A layer takes `layer_s` for a decoded token, and `prefill_s` for each token of a prompt after the
    first. `step_s` is what every step takes beside the layers: at the client embeddings, norm, head and sampling, at a
    server messages. The first step takes `start_s` more.

    Its process takes `base_bytes`, `weight_ratio` times the bytes of its layers' weights, and their KV cache: at most
    `memory_bytes`. For `overlapped_s` the client still works itself when a step has left it (flag head_overlap): the
    links and the servers' layers pass meanwhile; messages do not, since the client handles them itself. Beside a server
    it gains `overlap_share` of that, less than 1 where both share processors.
    """

    name: str
    memory_bytes: float
    base_bytes: float
    weight_ratio: float
    layer_s: float
    prefill_s: float
    step_s: float
    start_s: float
    overlapped_s: float = 0.0
    overlap_share: float = 1.0
    address: str = ""
    threads: int | None = None


@dataclass(frozen=True)
class Work:
    """What the layers ask of a machine, as sums over the layers before each one, so that a range is a difference.

    `units` counts layers by what they multiply, 1 is the mean one; KV bytes are those of one session's whole context.
    `around_bytes` are the client's weights outside the layers. A hidden state takes `row_bytes` on the wire.
    """

    units: tuple[float, ...]
    weight_bytes: tuple[float, ...]
    kv_bytes: tuple[float, ...]
    around_bytes: float
    row_bytes: float
    prompt_tokens: int

    @property
    def n_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.units) - 1

    @property
    def step_bytes(self) -> int:
        """Of a decoded token on the wire, one way."""
        return round(self.row_bytes + MESSAGE_BYTES)

    @property
    def prompt_bytes(self) -> int:
        """Of the prompt on the wire, one way."""
        return round(self.row_bytes * self.prompt_tokens + MESSAGE_BYTES)


def work_of(anatomy: Anatomy, prompt_tokens: int, context: int, row_bytes: float | None = None) -> Work:
    """The work of a model for one session. `row_bytes` None is a hidden state in the model's dtype."""
    size, layers = anatomy.bytes_per_value, [(layer,) for layer in anatomy.layers]
    around = anatomy.entrance + anatomy.exit + anatomy.shared + anatomy.everywhere
    return Work(
        _sums(units(anatomy, each) for each in layers),
        _sums(layer_bytes(anatomy, each) for each in layers),
        _sums(kv_values(each) * size * context for each in layers),
        around * size,
        row_bytes or anatomy.hidden_size * size,
        prompt_tokens,
    )


@dataclass(frozen=True)
class Network:
    """Machines in a row, the client first, and the links between them: `links[a, b]` for a < b, whose `up` leads from a
    to b. With `forward` servers send to each other, otherwise the client sends each answer on.

    Raises InputError for a link that is missing.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[int, int], Link]
    forward: bool = True

    def __post_init__(self) -> None:
        count = len(self.devices)
        needed = [(a, b) for a in range(count if self.forward else 1) for b in range(a + 1, count)]
        for a, b in needed:
            if (a, b) not in self.links:
                names = f"{self.devices[a].name} and {self.devices[b].name}"
                raise InputError("links", None, f"a link between {names}: rtt_ms, up_mbit and down_mbit")

    def ways(self, a: int, b: int) -> tuple[Way, ...]:
        """The ways of a hidden state from `a` to `b`, one after the other."""
        if b == CLIENT:
            return (self.links[b, a].down,)
        if a == CLIENT or self.forward:
            return (self.links[a, b].up,)
        return self.links[CLIENT, a].down, self.links[CLIENT, b].up


def _sums(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(values, initial=0.0))
