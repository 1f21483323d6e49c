"""Typed settings, read from config.yaml.

`load(path)` returns a frozen `Config`. An unknown key, a wrong type or a value out of range raises `InputError` that
names the key as it is written in the file (`split.start`), the value, and what would be right. Nothing here knows
which flags exist: `flags/registry.py` does.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

from splitlearn import address
from splitlearn.address import Address
from splitlearn.errors import InputError

EMBEDDED, RAY, RAY_SCHEME = "embedded", "ray", "ray://"
AUTO: Literal["auto"] = "auto"
Objective = Literal["tpot", "ttft", "memory", "throughput"]
"""What a plan has least or most of (planning/search.py)."""
Dtype = Literal["float32", "bfloat16", "float16"]
_Model = TypeVar("_Model", bound=BaseModel)


def valid_addresses(value: object) -> tuple[str, ...]:
    """The word `embedded` or `ray` alone, `ray://host:port` alone, or `host:port` with a port of 1 to 65535, once or
    several times: as a list, or as text with commas between; ValueError otherwise."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(each, str) for each in listed):
        raise ValueError(_ADDRESSES)
    addresses = tuple(each.strip() for each in listed)
    if addresses in ((EMBEDDED,), (RAY,)):
        return addresses
    if len(addresses) == 1 and has_directory(addresses):
        return (RAY_SCHEME + _address(addresses[0].removeprefix(RAY_SCHEME), 1),)
    found = tuple(_address(each, len(addresses)) for each in addresses)
    if len(set(found)) < len(found):
        raise ValueError("each address once")
    return found


def valid_next_servers(value: object) -> tuple[str, ...]:
    """A list of `host:port`, which may be empty; ValueError otherwise."""
    if not value and isinstance(value, list | tuple):
        return ()
    found = valid_addresses(value)
    if found in ((EMBEDDED,), (RAY,)) or has_directory(found):
        raise ValueError(f"a list of {address.ADDRESS}")
    return found


def valid_trunk(value: object) -> object:
    """`valid_addresses`, or the links of a chain, which are mappings. Raises InputError for what is no chain."""
    if not isinstance(value, list | tuple) or not any(isinstance(each, dict | TrunkLink) for each in value):
        return valid_addresses(value)
    links = tuple(_link(each, number) for number, each in enumerate(value, 1))
    for number, (before, link) in enumerate(pairwise(links), 2):
        _check_next(before, link, number)
    _check_once(links)
    return links


def _link(value: object, number: int) -> "TrunkLink":
    """Link `number` of a chain. Raises InputError."""
    if isinstance(value, TrunkLink):
        return value
    where = f"trunk.address, link {number}"
    if not isinstance(value, dict):
        raise InputError(where, value, "a mapping with layers and address, as the other links are")
    try:
        link = checked(TrunkLink, value, "config key")
    except InputError as error:
        raise InputError(f"{where}: {error.field}", error.value, error.expected) from error
    start, end = link.layers
    if not 0 <= start < end:
        raise InputError(f"{where}: layers", list(link.layers), "[start, end] with 0 <= start < end")
    if link.address in ((EMBEDDED,), (RAY,)) or has_directory(link.address):
        raise InputError(f"{where}: address", link.address[0], "the addresses of running servers: host:port")
    return link


def _check_next(before: "TrunkLink", link: "TrunkLink", number: int) -> None:
    """Raise InputError unless link `number` begins where the one before ends."""
    ends, begins = before.layers[1], link.layers[0]
    if begins == ends:
        return
    wrong = f"[{begins}, {ends}) would be in both" if begins < ends else f"[{ends}, {begins}) would be in none"
    raise InputError(
        f"trunk.address, link {number}", str(link), f"layers from {ends} on, where link {number - 1} ends: {wrong}"
    )


def _check_once(links: "Sequence[TrunkLink]") -> None:
    """Raise InputError for a server that is in two links."""
    seen: dict[str, int] = {}
    for number, link in enumerate(links, 1):
        for each in link.address:
            if seen.setdefault(each, number) != number:
                expected = f"each server in one link: {each} is in link {seen[each]}, too"
                raise InputError(f"trunk.address, link {number}", str(link), expected)


def has_directory(addresses: Sequence[str]) -> bool:
    """Whether `addresses` is that of a directory of trunks on Ray."""
    return len(addresses) == 1 and addresses[0].startswith(RAY_SCHEME)


# No segment begins with a dot, so that none is "..".
_ROOT_PATH = re.compile(r"(https?://[A-Za-z0-9.-]+(:\d{1,5})?)?(/[\w~-][\w.~-]*)*/?", re.ASCII)
_ADDRESSES = (
    f"'{EMBEDDED}', '{RAY}', {RAY_SCHEME}host:port, or {address.ADDRESS}; or a list of addresses, or of a chain's links"
)


def valid_chat(value: object) -> bool | str:
    """True, False or a name; ValueError otherwise."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip()):
        return value
    raise ValueError("true, false, or the name of one of the model's chat templates")


def root_path(text: str) -> str:
    """Where a proxy serves the page: "", a path or a whole URL, without a slash at the end. Raises ValueError."""
    if not _ROOT_PATH.fullmatch(text):
        raise ValueError('a path such as "/splitlearn", or a URL such as "https://page.example/splitlearn"')
    return text.removesuffix("/")


def _address(text: str, count: int) -> str:
    """`text` normalised; of several, the error names the one that is wrong."""
    try:
        return str(Address.parse(text))
    except ValueError as error:
        where = f"in the place of {text!r} " if count > 1 else f"'{EMBEDDED}', or " if text.isalpha() else ""
        raise ValueError(f"{where}{error}") from error


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


File = Annotated[Path, Field(strict=False)]
Host = Annotated[str, AfterValidator(address.host)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""The name of an environment variable that holds a secret, never the secret itself."""
RootPath = Annotated[str, AfterValidator(root_path)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")]
"""A name such as a browser asks for: no scheme, no port, no wildcard."""


class ModelConfig(_Section):
    """Which weights, where they run and in which dtype, and which model drafts for them."""

    name: str = Field("smollm2-135m-instruct", min_length=1)
    dtype: Dtype = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    cache: File | None = None
    draft: Annotated[str, Field(min_length=1)] | None = None


class SplitConfig(_Section):
    """The trunk's layers `[start, end)`; null means two layers from that end."""

    start: Annotated[int, Field(ge=0)] | None = None
    end: Annotated[int, Field(ge=1)] | None = None


def valid_split(value: object, _: object) -> "SplitConfig | Literal['auto']":
    """The word `auto`, or start and end; ValueError otherwise."""
    if value == AUTO:
        return AUTO
    if isinstance(value, str):
        raise ValueError(f"'{AUTO}', or a mapping with start and end")
    return SplitConfig.model_validate(value)


class PlanConfig(_Section):
    """How `split: auto` chooses: from the figures of a file of machines, measured where it leaves some out."""

    devices: File | None = None
    objective: Objective = "tpot"


class _Pair(_Section):
    """A certificate and its private key, PEM files: both or neither."""

    certificate: File | None = None
    key: File | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key together, or neither")
        return self


class TrunkTls(_Pair):
    """TLS at the client: `ca` signed the trunk's certificate, and its absence means plaintext."""

    ca: File | None = None
    server_name: str | None = None

    @model_validator(mode="after")
    def _only_with_ca(self) -> Self:
        if self.ca is None and (self.certificate is not None or self.server_name is not None):
            raise ValueError("ca, without which there is no TLS that the other keys could be for")
        return self


class TrunkLink(_Section):
    """A link of a chain of trunk servers: the `layers` [start, end) are at the first of `address` that works. `tls` and
    `token` are those of the whole trunk unless they are given."""

    layers: Annotated[tuple[int, int], Field(strict=False)]
    address: Annotated[tuple[str, ...], BeforeValidator(valid_addresses)]
    tls: TrunkTls | None = None
    token: Variable | None = None

    def __str__(self) -> str:
        start, end = self.layers
        return f"[{start}, {end}) at {' or '.join(self.address)}"


class TrunkConfig(_Section):
    """Where the client finds its trunk, the first address that works and the others when that one is lost, and what it
    shows to each. Of a chain of trunk servers, `address` has the links."""

    address: Annotated[tuple[str, ...] | tuple[TrunkLink, ...], BeforeValidator(valid_trunk)] = (EMBEDDED,)
    forward: bool = True
    """Whether the servers of a chain send their answers to the next one, in the place of the client."""
    link: Annotated[str, Field(min_length=1)] | None = None
    """Of an emulated link, in the words of link/words.py."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    verify: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of its answers that the client computes again; 0 is none."""
    tls: TrunkTls = TrunkTls()
    token: Variable = "SPLITLEARN_TRUNK_TOKEN"

    @property
    def embedded(self) -> bool:
        """True when this program starts its trunk itself."""
        return self.address in ((EMBEDDED,), (RAY,))

    @property
    def on_ray(self) -> bool:
        """True when this program starts its trunk itself, on a Ray of its own."""
        return self.address == (RAY,)

    @property
    def chain(self) -> tuple[TrunkLink, ...]:
        """The links of a chain; none of a single trunk."""
        return tuple(each for each in self.address if isinstance(each, TrunkLink))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of a single trunk; none of a chain."""
        return tuple(each for each in self.address if isinstance(each, str))

    @property
    def place(self) -> str:
        """Where the trunk is, for people."""
        return ", ".join(map(str, self.chain)) or " or ".join(self.addresses)


class ServerTls(_Pair):
    """TLS at the server; with `client_ca`, clients must show a certificate that it signed."""

    client_ca: File | None = None

    @model_validator(mode="after")
    def _only_with_certificate(self) -> Self:
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("certificate and key, without which there is no TLS for client_ca")
        return self


class ForwardConfig(_Section):
    """The next servers in chains of trunks: those to which this server may send the answers of a session, and what it
    shows to them."""

    addresses: Annotated[tuple[str, ...], BeforeValidator(valid_next_servers)] = ()
    tls: TrunkTls = TrunkTls()
    token: Variable = "SPLITLEARN_FORWARD_TOKEN"


class ServerConfig(_Section):
    """What `python -m server` listens on, whom it lets in, and how much it takes on."""

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    tls: ServerTls = ServerTls()
    tokens: File | None = None
    allow_open: bool = False
    forward_to: ForwardConfig = ForwardConfig()
    metrics_host: Host = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    max_sessions: Annotated[int, Field(ge=1, le=1024)] = 64
    max_waiting: Annotated[int, Field(ge=0, le=1024)] = 32
    max_variants: Annotated[int, Field(ge=0, le=64)] = 1
    offered_flags: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    kv_bytes: Annotated[int, Field(ge=1)] | None = None
    kv_block_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    prompt_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    max_message_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 3 * 1024 * 1024
    open_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    idle_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    max_wait_s: Annotated[float, Field(gt=0, le=86400)] = 600.0


class PrefixCacheConfig(_Section):
    """What the flag prefix_cache may keep in each process that has it: workers and trunk servers. What leaves the
    memory of a GPU goes to that of the host, and from there to files."""

    device_bytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    memory_bytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    file_bytes: Annotated[int, Field(ge=0)] = 0
    folder: File | None = None
    survives_restart: bool = False


Layers = Annotated[tuple[int, int], Field(strict=False)]
"""[start, end)."""
Port = Annotated[int, Field(ge=1, le=65535)]


class RayConfig(_Section):
    """Trunk servers on Ray: how many, and what Ray reserves for each. `ports` are the first and the last that they may
    listen on, None for any. `layers` are the links of a chain, [start, end)
    each; None is one link, the layers of `split`."""

    layers: Annotated[tuple[Layers, ...], Field(strict=False, min_length=1, max_length=64)] | None = None
    min_replicas: Annotated[int, Field(ge=1, le=256)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=256)] = 2
    idle_s: Annotated[float, Field(ge=0, le=86400)] = 60.0
    num_cpus: Annotated[float, Field(gt=0, le=1024)] = 1.0
    num_gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    memory: Annotated[int, Field(ge=1)] | None = None
    ports: Annotated[tuple[Port, Port], Field(strict=False)] | None = None
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "splitlearn"

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.ports is not None and self.ports[0] > self.ports[1]:
            raise ValueError(f"ports as [first, last], not {list(self.ports)}")
        return self

    @model_validator(mode="after")
    def _chained(self) -> Self:
        ends = None
        for number, (start, end) in enumerate(self.layers or (), 1):
            if not 0 <= start < end or ends not in (None, start):
                wanted = "" if ends is None else f", and start {ends}, where the link before ends"
                raise ValueError(f"layers with 0 <= start < end{wanted}: link {number} is [{start}, {end}]")
            ends = end
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"max_replicas of at least min_replicas, which is {self.min_replicas}")
        return self


class GenerationConfig(_Section):
    """What a request has when nothing else is said."""

    prompt: str = "Explain in two sentences why the sky is blue."
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 96
    chat: Annotated[bool | str, BeforeValidator(valid_chat)] = True
    """Whether the model's chat template is applied, or the name of one of several."""


class RunsConfig(_Section):
    """The worker processes in which arms run."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    warm_workers: Annotated[int, Field(ge=1, le=64)] | None = None


class UiConfig(_Section):
    """The page. `auth` names the environment variable that holds `user:password`; `allowed_hosts` are names, without
    ports, by which the page is reached besides `host` and those of loopback. `root_path` is where a proxy serves it.
    `api` puts the OpenAI protocol under the page's port, with the keys of `ApiConfig`.
    `history_file` is whether comparisons are kept on disk; None for those of the owner of a page on loopback."""

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    allow_open: bool = False
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False)] = ()
    root_path: RootPath = ""
    mcp: bool = False
    api: bool = False
    history_file: bool | None = None
    share: bool = False
    auth: Variable = "SPLITLEARN_AUTH"


class ApiConfig(_Section):
    """The endpoint of the OpenAI protocol (`splitlearn serve`). Names of the endpoint besides those of loopback and
    `host` are `allowed_hosts`."""

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tls: _Pair = _Pair()
    tokens: File | None = None
    allow_open: bool = False
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False)] = ()
    max_running: Annotated[int, Field(ge=1, le=256)] = 16
    max_waiting: Annotated[int, Field(ge=0, le=1024)] = 32
    kv_bytes: Annotated[int, Field(ge=1)] | None = None


class Config(_Section):
    """All settings; every field has a default, so an empty file is a working one."""

    model: ModelConfig = ModelConfig()
    split: Annotated[SplitConfig | Literal["auto"], WrapValidator(valid_split)] = SplitConfig()
    plan: PlanConfig = PlanConfig()
    trunk: TrunkConfig = TrunkConfig()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    generation: GenerationConfig = GenerationConfig()
    flags: str = "auto"
    runs: RunsConfig = RunsConfig()
    ui: UiConfig = UiConfig()
    api: ApiConfig = ApiConfig()

    @property
    def cut(self) -> SplitConfig:
        """The configured cut. Raises InputError for `split: auto`, before a program has planned one in its place."""
        if isinstance(self.split, SplitConfig):
            return self.split
        raise InputError("split", AUTO, "start and end: only clients plan a cut")


def load(path: Path | None) -> Config:
    """Read `path`, or take every default when it is None. Raises InputError for a file that cannot be used."""
    return parse({} if path is None else read(path, "config", "'model:' and 'split:'"))


def read(path: Path, field: str, sections: str) -> dict[str, object]:
    """The plain data of a YAML file. Raises InputError that names `field` and the `sections` of such a file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(field, str(path), f"a readable file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(field, str(path), f"valid YAML ({' '.join(str(error).split())})") from error
    if data is not None and not isinstance(data, dict):
        raise InputError(field, str(path), f"a YAML mapping of sections such as {sections}")
    return data or {}


def parse(data: dict[str, object]) -> Config:
    """Build a Config from plain data. Raises InputError that names the first wrong key."""
    return checked(Config, data, "config key")


def checked(kind: type[_Model], data: dict[str, object], key: str) -> _Model:
    """A record from plain data. Raises InputError that names the first wrong value; an unknown key is called `key`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first_error(kind, error, key) from error


def _first_error(kind: type[BaseModel], error: ValidationError, key: str) -> InputError:
    """The first of pydantic's findings, in the words of the file."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return InputError(key, ".".join(place), f"one of: {', '.join(_keys(kind, place[:-1]))}")
    if first["type"] == "missing":
        return InputError(".".join(place), None, "a value: it has no default")
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError(".".join(place), first["input"], expected)


def _keys(section: type[BaseModel], place: list[str]) -> list[str]:
    """The keys that are known at `place` of a section. Names and numbers of the entries of a collection are passed."""
    for name in place:
        field = section.model_fields.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)


def serving(config: Config, flags: Iterable[str]) -> Config:
    """The same settings for a trunk server whose own flags are `flags`."""
    return parse({**config.model_dump(), "flags": f"trunk:{','.join(sorted(flags)) or 'none'}"})


def with_chat(config: Config, chat: bool | str) -> Config:
    """The same settings with another `generation.chat`."""
    return parse({**config.model_dump(), "generation": {**config.generation.model_dump(), "chat": chat}})


def with_trunk(config: Config, address: str) -> Config:
    """The same settings with another trunk address, or several with commas between. Raises InputError for others."""
    return parse({**config.model_dump(), "trunk": {**config.trunk.model_dump(), "address": address}})


def with_cut(config: Config, start: int, end: int) -> Config:
    """The same settings with another cut."""
    return config.model_copy(update={"split": SplitConfig(start=start, end=end)})


def with_link(config: Config, words: str) -> Config:
    """The same settings with another emulated link."""
    return parse({**config.model_dump(), "trunk": {**config.trunk.model_dump(), "link": words}})
