"""`split: auto`: chooses the cut before the model is loaded, and says in a sentence which one and why.

    runs = Runs(config, progress, settle)       # Setup.read_model calls settle(config, progress)

A running server has one range of layers, so that is the cut; of several servers with different ranges, the one that is
best for `plan.objective`. For an embedded trunk every cut can be had. Figures come from the file `plan.devices`, and
short runs measure what it leaves out (docs/planning.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from splitlearn.arms.model_choice import why_no_room
from splitlearn.arms.setup import Settled
from splitlearn.checkpoints import catalogue, folder
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.directory import resolved
from splitlearn.client.served import ServedModel, check_served, describe
from splitlearn.config import AUTO, Config, Objective, SplitConfig, with_cut
from splitlearn.errors import InputError, SplitlearnError, TrunkError, TrunkUnavailable
from splitlearn.link import words
from splitlearn.link.emulated import NONE
from splitlearn.models.plan import SplitPlan, plan_of
from splitlearn.planning import anatomy, devices
from splitlearn.planning.advice import BUSY, ERROR
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.choice import Choice, sentence
from splitlearn.planning.devices import DeviceEntry, DevicesFile
from splitlearn.planning.machines import client_figures, client_rates, filled, is_open, measured, trunk_figures
from splitlearn.planning.network import Network, Work, work_of
from splitlearn.planning.route import Route, Span, predict
from splitlearn.planning.search import rank
from splitlearn.runtime import cgroups
from splitlearn.runtime.progress import Progress
from splitlearn.runtime.terminal import say
from splitlearn.wire import channel

PROMPT_TOKENS = 128
"""Of the session that is planned for. Its answer has generation.max_new_tokens."""
Found = tuple[SplitPlan, Choice]


@dataclass(frozen=True)
class _Question:
    """What is planned: `file` has the client and the trunk."""

    config: Config
    files: ModelFiles
    model: Anatomy
    file: DevicesFile

    def work(self, row_bytes: float | None) -> Work:
        context = PROMPT_TOKENS + self.config.generation.max_new_tokens
        return work_of(self.model, PROMPT_TOKENS, context, row_bytes)

    @property
    def objective(self) -> Objective:
        return self.config.plan.objective


def settle(config: Config, progress: Progress) -> Settled:
    """`config` with a cut in the place of `auto`, which is said on the terminal. Raises TrunkError where no server can
    be used, InputError for a file of machines that cannot be used, or where no cut fits them."""
    file = _two_machines(config)
    files = catalogue.prepare(config.model, progress)
    if config.trunk.chain:
        settled = _of_chain(config, files)
    else:
        question = _Question(config, files, anatomy.read(files, config.model.dtype), file)
        settled = (_embedded if config.trunk.embedded else _remote)(question, progress)
    say(settled.why, stderr=True)
    return settled


def _of_chain(config: Config, files: ModelFiles) -> Settled:
    cut = plan_of(config, files.n_layers)
    why = f"split: auto took {_layers(cut)}, which the chain in trunk.address has."
    return Settled(with_cut(config, cut.start, cut.end), why)


def without_figures(config: Config, progress: Progress) -> Settled:
    """`config` with a cut for what needs none in particular: a server's range, or the usual one. Raises TrunkError."""
    if config.split != AUTO:
        return Settled(config)
    if config.trunk.embedded:
        return Settled(config.model_copy(update={"split": SplitConfig()}))
    files = catalogue.prepare(config.model, progress)
    cut = plan_of(config, files.n_layers) if config.trunk.chain else next(iter(_ranges(config, files)))
    return Settled(with_cut(config, cut.start, cut.end))


def smallest_among_best(work: Work, network: Network, objective: Objective) -> tuple[Route | None, bool]:
    """Of the cuts that fit both machines, the best one, and whether it had equals.

    Predictions of time are ERROR off. So of the cuts within that of the best one, the one with the smallest client is
    taken. None if nothing fits.
    """
    n = work.n_layers
    routes = (predict(work, network, (Span(1, start, end),)) for start in range(n) for end in range(start + 1, n + 1))
    fits = sorted((route for route in routes if route.fits), key=lambda route: rank(route, objective))
    if not fits or objective == "memory":
        return (fits[0] if fits else None), False
    choice = Choice(work, network, objective, fits[0], None)
    equals = [route for route in fits if choice.cost(route) <= ERROR * choice.cost(fits[0])]
    return min(equals, key=lambda route: (route.client_memory_bytes, route.tpot_s)), len(equals) > 1


def _two_machines(config: Config) -> DevicesFile:
    """The configured file, or one that leaves everything out."""
    path = config.plan.devices
    if path is None:
        return DevicesFile(devices={"client": DeviceEntry(), "trunk": DeviceEntry()})
    file = devices.load(path)
    if len(file.devices) != 2:
        raise InputError("plan.devices", str(path), "a file with two machines, the client and the trunk server")
    return file


def _embedded(question: _Question, progress: Progress) -> Settled:
    """The best cut of a trunk that this program starts."""
    config, model, file = question.config, question.model, question.file
    (name, client), (other, trunk) = file.devices.items()
    row_bytes, others = None, 0.0
    if is_open(client) or is_open(trunk):
        free = cgroups.available_memory()
        rates = client_rates(config, config.flags, model, progress)
        client = filled(client, {**client_figures(model, rates), "memory": free})
        trunk = filled(trunk, {**trunk_figures(rates), "memory": free})
        row_bytes, others = rates.prompt_token_bytes, rates.others_cpu
    link = devices.links_of(file).get((0, 1), words.parse(config.trunk.link or NONE, "trunk.link"))
    network = Network((devices.device_of(name, client), devices.device_of(other, trunk)), {(0, 1): link})
    work = question.work(row_bytes)
    route, equals = smallest_among_best(work, network, question.objective)
    if route is None:
        expected = "start and end here, a smaller model, or machines with more memory: no cut fits these"
        raise InputError("split", AUTO, expected)
    found = Choice(work, network, question.objective, predict(work, network, ()), route)
    cut = SplitPlan(route.spans[0].start, route.spans[0].end, model.n_layers)
    among = f", the smallest client of the cuts within {ERROR - 1:.0%} of the best" if equals else ""
    why = f"split: auto chose {_layers(cut)}{among}. {sentence(found)}{_doubt(others)}"
    return Settled(with_cut(config, cut.start, cut.end), why)


def _doubt(others_cpu: float) -> str:
    """What to think of times that a busy machine had."""
    return f" Other programs used {others_cpu:.1f} cores meanwhile, so times may mislead." if others_cpu >= BUSY else ""


def _remote(question: _Question, progress: Progress) -> Settled:
    """The range of the servers, or the best of several ranges."""
    config = question.config
    ranges = _ranges(config, question.files)
    found: Found | None = None
    trouble = why_no_room(folder.parameters(question.files.folder), config.model.dtype, cgroups.available_memory())
    if not trouble or not is_open(next(iter(question.file.devices.values()))):
        try:
            found = min(_predicted(question, ranges, progress), key=lambda each: rank(_split(each), question.objective))
        except SplitlearnError as error:  # the range is known all the same
            trouble = str(error)
    cut = found[0] if found else next(iter(ranges))
    unusable = {address for plan, listed in ranges.items() if plan != cut for address in listed}
    kept = tuple(address for address in config.trunk.addresses if address not in unusable)
    servers = " and ".join(ranges[cut])
    said = sentence(found[1]) if found else f"What it costs was not predicted: {trouble.rstrip('.')}."
    settled = with_cut(config, cut.start, cut.end)
    trunk = config.trunk.model_copy(update={"address": kept})
    why = f"split: auto took {_layers(cut)}, which the trunk server at {servers} has. {said}"
    return Settled(settled.model_copy(update={"trunk": trunk}), why)


def _ranges(config: Config, files: ModelFiles) -> dict[SplitPlan, list[str]]:
    """The ranges that servers of this model have, with their addresses. Raises the first TrunkError if there are
    none."""
    shown, found, first = channel.credentials(config.trunk), dict[SplitPlan, list[str]](), list[TrunkError]()
    for address in resolved(config.trunk.addresses, shown):
        try:
            said = describe(address, shown)
            whole = SplitPlan(0, files.n_layers, files.n_layers)
            plan = whole if said.n_layers != files.n_layers else SplitPlan(said.start, said.end, said.n_layers)
            served = ServedModel(files.name, files.digest, plan, config.model.dtype, files.facts.hidden_size)
            check_served(said, served, address)
            found.setdefault(plan, []).append(address)
        except TrunkError as error:
            first.append(error)
    if not found:
        raise first[0] if first else TrunkUnavailable(f"{config.trunk.address[0]} has no trunk server yet.")
    return found


def _predicted(question: _Question, ranges: dict[SplitPlan, list[str]], progress: Progress) -> Iterator[Found]:
    """What each range costs; the client is measured once."""
    file = question.file
    name, other = file.devices
    for plan, addresses in ranges.items():
        server = file.devices[other].model_copy(update={"address": addresses[0]})
        asked = file.model_copy(update={"devices": {**file.devices, other: server}})
        config = with_cut(question.config, plan.start, plan.end)
        asked, row_bytes = measured(asked, config, config.flags, question.model, PROMPT_TOKENS, progress)
        file = file.model_copy(update={"devices": {**file.devices, name: asked.devices[name]}})
        network, work = devices.network_of(asked), question.work(row_bytes)
        route = predict(work, network, (Span(1, plan.start, plan.end),))
        yield plan, Choice(work, network, question.objective, predict(work, network, ()), route)


def _split(found: Found) -> Route:
    route = found[1].split
    assert route is not None  # _predicted has made it
    return route


def _layers(plan: SplitPlan) -> str:
    return f"trunk layers [{plan.start}, {plan.end}) of {plan.n_layers}"
