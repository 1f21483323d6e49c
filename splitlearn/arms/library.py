"""The public functions behind `import splitlearn`: stages in this process, and a comparison in processes of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from splitlearn import config
from splitlearn.arms import worker_main
from splitlearn.arms.capabilities import Question
from splitlearn.arms.capabilities_main import place_of
from splitlearn.arms.compare import compare as compare_arms
from splitlearn.arms.link_cost import link_cost
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.arms.worker_main import Arm
from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.download import PartOf
from splitlearn.client.hop import hops_of
from splitlearn.client.served import with_trunk
from splitlearn.config import Config
from splitlearn.errors import SplitlearnError
from splitlearn.events import Event, GenerationRequest, Kind
from splitlearn.flags import selection
from splitlearn.flags.registry import SIDES
from splitlearn.link.words import parse
from splitlearn.models.part import Part
from splitlearn.models.plan import plan_of
from splitlearn.response_format import JsonFormat
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams
from splitlearn.stages.base import Stage

MODEL = "smollm2-135m-instruct"


class Stages(Sequence[Stage]):
    """A loaded model as a chain of stages, in order; `generate` runs a prompt through it.

    Each stage maps token ids int64 [1, T] or hidden states [1, T, hidden_size] to hidden states, the last one to
    logits. Use as a context, or call `close`, where the trunk is remote: that closes the connection.
    """

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def __len__(self) -> int:
        return len(self._arm.answers.links)

    def __getitem__(self, at: Any) -> Any:
        stages = [link.stage for link in self._arm.answers.links]
        return stages[at]

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to a remote trunk. What is local ends with the last reference to it."""
        for trunk in self._arm.trunks:
            trunk.close()

    def events(self, request: GenerationRequest) -> Iterator[Event]:
        """The events of one generation."""
        yield from self._arm.answers.stream(request)


def load_full(
    model: str = MODEL,
    *,
    flags: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
) -> Stages:
    """Load the whole model into this process, as one stage.

    `model` is a name of the catalogue, a hub id, a folder or a GGUF file; what the cache lacks is fetched. `flags` are
    words as on the command line, `dtype` and `device` as in config.yaml, `threads` torch's threads, None for one a
    core. Raises InputError for what cannot be used, ModelError for a model that cannot.
    """
    return Stages(worker_main.load(_spec("full", _settings(model, dtype, device, threads), flags)))


def load_split(
    model: str = MODEL,
    start: int | None = None,
    end: int | None = None,
    *,
    trunk: str | None = None,
    flags: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
) -> Stages:
    """Load a split model: the bottom with the layers [0, start), the trunk [start, end), the top with the others, and
    the LM head.

    All stages are local, or the trunk is that of the server at `trunk` ("host:port" or "ray://host:port"). None for
    `start` or `end` leaves two layers at that end. The other arguments and errors are those of `load_full`; raises
    TrunkError for a trunk that does not answer or serves something else.
    """
    settings = _settings(model, dtype, device, threads, start, end, trunk)
    return Stages(worker_main.load(_spec("split", settings, flags)))


def generate(
    stages: Stages,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool | str = True,
    ignore_eos: bool = False,
    stop: Sequence[str] = (),
    samples: int = 1,
    sampling: SamplingParams | None = None,
    response_format: JsonFormat | None = None,
) -> Iterator[Event]:
    """Generate an answer: a TokenEvent for each step as it comes, then a Done, for each of the `samples`.

    Times are seconds since the prompt was given. `chat` applies the model's chat template, or that of several with this
    name; `sampling` None is greedy. `response_format` holds the answer to JSON. Raises InputError for a request that
    cannot be used, TrunkError for a trunk that fails. Closing the iterator ends the generation.
    """
    request = _request(prompt, max_new_tokens, chat, ignore_eos, stop, samples, sampling)
    return stages.events(replace(request, response_format=response_format))


def compare(
    prompt: str,
    model: str = MODEL,
    start: int | None = None,
    end: int | None = None,
    *,
    trunk: str | None = None,
    link: str | None = None,
    flags: str = "auto",
    max_new_tokens: int = 64,
    chat: bool | str = True,
    ignore_eos: bool = False,
    stop: Sequence[str] = (),
    samples: int = 1,
    sampling: SamplingParams | None = None,
    pairs: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Run a prompt through the full and the split model, each in a process of its own, and compare them.

    Each arm runs `pairs` times, in turn with the other one.
    Returns the object that `splitlearn compare --json` prints (docs/command-line.md): seconds and bytes. Without
    `trunk`, a trunk server is started for it. `link` emulates a link to the trunk, in words (docs/links.md). The other
    arguments and errors are those of `load_split` and `generate`. Call it below `if __name__ == "__main__":`, as
    everything that starts processes.
    """
    request = _request(prompt, max_new_tokens, chat, ignore_eos, stop, samples, sampling)
    settings = _settings(model, dtype, device, threads, start, end, trunk, chat)
    settings = settings if link is None else config.with_link(settings, str(parse(link)))
    with Runs(settings, silent) as runs:
        runs.check_trunk()
        chosen = runs.flags(flags)
        found = compare_arms(runs, request, chosen, pairs)
        cost = link_cost(runs, request, chosen, found.split) if found is not None else None
    if found is None:  # nothing sets the cancellation here
        raise SplitlearnError("The comparison ended early.")
    return {**found.as_json(), "link": cost and cost.as_json()}


def _settings(
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    start: int | None = None,
    end: int | None = None,
    trunk: str | None = None,
    chat: bool | str = True,
) -> Config:
    return config.parse(
        {
            "model": {"name": model, "dtype": dtype, "device": device},
            "split": {"start": start, "end": end},
            "generation": {"chat": chat},
            "runs": {"threads": threads},
            **({} if trunk is None else {"trunk": {"address": trunk}}),
        }
    )


def _request(
    prompt: str,
    max_new_tokens: int,
    chat: bool | str,
    ignore_eos: bool,
    stop: Sequence[str],
    samples: int,
    sampling: SamplingParams | None,
) -> GenerationRequest:
    chosen = sampling or SamplingParams()
    return GenerationRequest(prompt, max_new_tokens, chat, ignore_eos, tuple(stop), chosen, samples)


def _spec(kind: Kind, settings: Config, flags: str) -> ArmSpec:
    """What to load: checked, with the flags that can be applied here and at the trunk."""
    selection.check(flags)
    model = settings.model
    files = catalogue.prepare(model, silent, part=_needed(kind, settings))
    place = place_of(Question(files, None, model.device, model.dtype, chat=False))
    known = selection.availability(dict.fromkeys(SIDES, place))
    plan = plan_of(settings, files.n_layers)
    hops = () if kind == "full" else hops_of(settings.trunk, plan)
    arm = partial(ArmSpec.of, kind, settings, files, plan, place.device)
    described = [said for hop in hops for said in hop.check_each(arm(selection.FlagSet()).served())]
    known = with_trunk(known, *described) if described else known
    return arm(selection.parse(flags, known), hops)


def _needed(kind: Kind, settings: Config) -> PartOf | None:
    """The part of the model that a client has whose trunk is at servers; None for all of it. Spot checks compute the
    trunk's layers, too."""
    if kind == "full" or settings.trunk.embedded or settings.trunk.verify:
        return None
    return lambda n_layers: Part.of_client(plan_of(settings, n_layers))
