"""A chain of trunk servers, driven by the client or forwarding: the tokens of the full model, also when one is lost."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trustme

from splitlearn import config
from splitlearn.arms.compare import compare
from splitlearn.arms.link_cost import link_cost
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli.tables import print_comparison
from splitlearn.client.forwarding_chain import ForwardingChain
from splitlearn.client.hop import Hop
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.errors import InputError, TrunkRefused, TrunkUnavailable
from splitlearn.events import GenerationRequest
from splitlearn.flags import registry
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.head_overlap import OverlapPolicy
from splitlearn.generation.prefix_cache import PrefixCache
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.prefix_store import Memory, PrefixStore
from splitlearn.metrics import of_samples
from splitlearn.models.plan import SplitPlan, plan_of
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from tests.client.test_remote import free_port
from tests.conftest import TinyFactory
from tests.support.chain import THREE, ChainHere, chain_here
from tests.support.client import CACHED, client
from tests.support.proxy import proxy
from tests.support.trunk import eventually, serve_here, served, settings
from tests.support.words import generation_of, load_of, session_of
from ui.compare import time as waterfall
from ui.trunk.monitor import Monitor
from ui.trunk.view import cards

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2")
# Left to itself, a tiny random model with a tied head says the last token again and again.
GREEDY = SamplingParams(repetition_penalty=1.5)
SEEDED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
PROMPT = "The sky is blue because air scatters short waves of light more than long ones."
TOKENS = 12


def asked(sampling: SamplingParams = GREEDY, samples: int = 1) -> GenerationRequest:
    return GenerationRequest(PROMPT, TOKENS, ignore_eos=True, sampling=sampling, samples=samples)


def answers(generator: Generator, asked: GenerationRequest) -> list[tuple[int, ...]]:
    return [each.token_ids for each in of_samples(list(generator.stream(asked)), asked.samples)]


def full(files: ModelFiles, *requests: GenerationRequest) -> list[list[tuple[int, ...]]]:
    """The answers of the whole model."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    stage = loading.load(files, loading.full_specs(files.n_layers), load_of(CACHED), placement).stages[0]
    tokens = Tokens.load(files.folder, use_fast=True)
    generator = Generator([Link(stage, session_of(CACHED))], tokens, None, generation_of(CACHED))
    found = [answers(generator, asked) for asked in requests]
    assert all(len(set(ids)) > 2 for each in found for ids in each), "a model that repeats itself shows little"
    return found


@pytest.fixture(params=[False, True], ids=["driven", "forwarding"])
def forward(request: pytest.FixtureRequest) -> bool:
    """Whether the servers pass their answers on themselves."""
    return bool(request.param)


@pytest.fixture(scope="module")
def servers(files: ModelFiles) -> Iterator[ChainHere]:
    with chain_here(files, THREE) as made:
        yield made


@pytest.fixture
def hops(servers: ChainHere) -> Iterator[Sequence[Hop]]:
    """The way to these servers. After a test nothing is left of its sessions."""
    yield servers.hops
    assert eventually(servers.free, within_s=60)


@pytest.fixture(scope="module")
def wanted(files: ModelFiles) -> tuple[int, ...]:
    ((found,),) = full(files, asked())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_of_two_and_of_three_give_the_tokens_of_the_full_model(family: str, tiny_model: TinyFactory) -> None:
    files = tiny_model(family)
    questions = [asked(), asked(SEEDED)]
    right = full(files, *questions)
    with chain_here(files, THREE) as three:
        for links, forward in product((three.hops, three.hops[1:]), (False, True)):
            with client(files, hops=links, forward=forward) as asking:
                assert [[asking.ask(each).token_ids] for each in questions] == right


@pytest.mark.parametrize(
    ("own", "trunk"),
    [
        ({"prompt_lookup"}, CACHED),
        ({"prefill_overlap"}, CACHED),
        ({"head_overlap"}, CACHED),
        ({"prefill_overlap", "head_overlap", "cache"}, CACHED),
        (set(), CACHED - {"use_cache"}),
    ],
    ids=["drafts", "chunks", "early-starts", "all", "recomputing"],
)
def test_no_flag_changes_a_token(
    own: set[str],
    trunk: frozenset[str],
    hops: Sequence[Hop],
    files: ModelFiles,
    wanted: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    forward: bool,
) -> None:
    in_chunks_of(3, monkeypatch)
    monkeypatch.setattr(OverlapPolicy, "pays", lambda self: True)
    greedy = GenerationRequest(PROMPT, TOKENS, ignore_eos=True)
    with (
        client(files, hops=hops) as plain,
        client(files, hops=hops, forward=forward, own=CACHED | own, trunk=trunk) as asking,
    ):
        assert asking.ask(asked()).token_ids == wanted
        found = asking.ask(greedy)
        assert found.token_ids == plain.ask(greedy).token_ids
    assert (found.head_starts > 0) == ("head_overlap" in own)
    assert set(found.hops) == {(plan.start, plan.end) for plan in THREE}
    assert sum(found.ledger.values()) == pytest.approx(found.e2el_s)
    for part in ("trunk", "queue") if forward else ("trunk", "queue", "wire"):
        of_hops = sum(parts[part] for parts in found.hops.values())
        assert of_hops == pytest.approx(found.ledger[part]), part


def in_chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = registry.FLAGS["prefill_overlap"]
    chunked = {
        **overlap.choices,
        "on": lambda settings: replace(settings, generation=replace(settings.generation, chunk_tokens=tokens)),
    }
    known = cast(dict[str, registry.Flag], registry.FLAGS)
    monkeypatch.setitem(known, overlap.name, replace(overlap, choices=chunked))


def test_each_sample_is_the_answer_of_its_seed(hops: Sequence[Hop], files: ModelFiles, forward: bool) -> None:
    question = asked(SEEDED, samples=3)
    (right,) = full(files, question)
    with client(files, hops=hops, forward=forward) as asking:
        assert [each.token_ids for each in of_samples(list(asking.stream(question)), 3)] == right


def test_kept_prefixes_are_found_at_every_server(
    hops: Sequence[Hop], files: ModelFiles, wanted: tuple[int, ...], forward: bool
) -> None:
    flags = CACHED | {"prefix_cache"}
    with client(files, hops=hops, forward=forward, own=flags, trunk=flags) as asking:
        asking.keep(PrefixCache(PrefixStore([Memory("memory", 1 << 20)]), b"secret", b"context"))
        first, second = asking.ask(asked()), asking.ask(asked())
        several = asked(SEEDED, samples=2)
        samples = of_samples(list(asking.stream(several)), 2)
    assert [[each.token_ids for each in samples]] == full(files, several)
    assert samples[0].cached_tokens > 0
    assert (first.token_ids, second.token_ids) == (wanted, wanted)
    assert first.cached_tokens == 0 < second.cached_tokens


def test_hidden_states_go_to_every_server_in_the_form_that_is_asked_for(
    hops: Sequence[Hop], files: ModelFiles, forward: bool
) -> None:
    found = []
    for form in (set(), {"wire_dtype"}):
        with client(files, hops=hops, forward=forward, own=CACHED | form, trunk=CACHED | form) as asking:
            found.append(asking.ask(asked()))
    plain, short = found
    assert short.n_tokens == TOKENS
    assert short.bytes_up < plain.bytes_up / 2


@pytest.mark.parametrize("number", range(3))
def test_a_server_that_is_lost_costs_no_token(
    number: int,
    servers: ChainHere,
    hops: Sequence[Hop],
    files: ModelFiles,
    wanted: tuple[int, ...],
    forward: bool,
) -> None:
    hop, between = hops[number], servers.proxies[number]
    links = [*hops]
    links[number] = replace(hop, addresses=(between.address, *hop.addresses))
    with client(files, hops=links, forward=forward, own=CACHED | {"head_overlap"}) as asking:
        found = asking.ask(asked(), lambda token: between.cut() if token == 5 else None)
    assert found.token_ids == wanted
    ((token, recovery),) = found.recoveries
    assert (token, recovery.lost, recovery.found) == (6, between.address, hop.addresses[0])
    if not forward:
        (lost,) = [layers for layers, parts in found.hops.items() if "recover" in parts]
        assert lost == (hop.plan.start, hop.plan.end)


def test_a_session_that_is_left_in_the_middle_leaves_nothing_behind(
    hops: Sequence[Hop], files: ModelFiles, wanted: tuple[int, ...]
) -> None:
    """A step that was started early is under way."""
    with client(files, hops=hops, forward=True, own=CACHED | {"head_overlap"}) as asking:
        for at in range(1, 4):
            events = asking.stream(GenerationRequest(PROMPT, TOKENS, ignore_eos=True))
            for _ in range(at):
                next(events)
            events.close()
        assert asking.ask(asked()).token_ids == wanted
        assert all(facts.peak_rss_bytes for facts in asking.stage.facts_of_each)


def test_why_a_server_cannot_reach_the_next_one_is_said(hops: Sequence[Hop], files: ModelFiles, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted.pem"
    trustme.CA().cert_pem.write_to_path(trusted)
    forward_to = {"addresses": list(hops[1].addresses), "tls": {"ca": str(trusted)}}  # the next one has no TLS
    with serve_here(files, "trunk:none", {}, (1, 2), forward_to=forward_to) as first:
        links = [Hop(hops[0].plan, (first.address,), link="1 of 2"), replace(hops[1], link="2 of 2")]
        whole = served(files, SplitPlan(1, 4, 6))
        stage = RemoteStage((), whole, 2, chain=ForwardingChain(links, whole, 2))
        with closing(stage):
            session = stage.open(session_of(CACHED), 16)
            x = torch.zeros(1, 1, files.facts.hidden_size)
            with pytest.raises(
                TrunkUnavailable, match=rf"next server of the chain, {hops[1].addresses[0]}: .*(?i:tls|ssl)"
            ):
                stage.step([StageInput(session, 0, x)])


def test_a_server_that_may_not_forward_to_the_next_one_is_named_when_a_session_opens(
    servers: ChainHere, hops: Sequence[Hop], files: ModelFiles
) -> None:
    last = servers.servers[2].address
    alone = "localhost:" + last.rpartition(":")[2]  # a name that no server lists
    unlisted = rf"^Link 2 of 3, layers \[2, 4\): .*not forward to '{alone}' \(server"
    cases = [
        ([*hops[:2], replace(hops[2], addresses=(alone,))], unlisted),
        ([*hops[:2], replace(hops[2], addresses=(last, alone))], unlisted),  # only the spare is not
        (
            [replace(hops[2], link="1 of 2"), replace(hops[1], link="2 of 2")],
            r"^Link 1 of 2, layers \[4, 5\): .*forwards to no other",
        ),
    ]
    for links, said in cases:
        whole = served(files, SplitPlan(1, 5, 6))
        stage = RemoteStage((), whole, 20, chain=ForwardingChain(links, whole, 20))
        with closing(stage), pytest.raises(TrunkRefused, match=said + r".*trunk\.forward: false") as told:
            stage.open(session_of(CACHED), 16)
        assert "\n" not in str(told.value)


def test_a_comparison_names_every_server(
    hops: Sequence[Hop], files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = config.parse(
        settings(files, trunk={"address": links_of(hops), "forward": False, "link": "rtt=2ms", "verify": 0.5})
    )
    with Runs(parsed, silent) as runs:
        runs.check_trunk()
        seen = (monitor := Monitor(runs, lambda: False)).see()
        monitor.close()
        flags = FlagSet(CACHED, CACHED, CACHED)
        found = compare(runs, GenerationRequest(PROMPT, TOKENS, ignore_eos=True), flags)
        assert found is not None
        cost = link_cost(runs, GenerationRequest(PROMPT, TOKENS, ignore_eos=True), flags, found.split)
    said = found.as_json()
    assert said["identical_tokens"] and said["split"] == {"start": 1, "end": 5, "n_layers": 6}
    listed = said["split_run"]["hops"]
    assert [(tuple(each["layers"]), each["address"]) for each in listed] == [
        ((hop.plan.start, hop.plan.end), hop.addresses[0]) for hop in hops
    ]
    assert sum(each["ledger"]["trunk_s"] for each in listed) == pytest.approx(said["split_run"]["ledger"]["trunk_s"])
    assert min(found.split.metrics.itl_s) > 3 * 0.002 * 0.9  # a trip to each server
    assert cost is not None and cost.predicted.tpot_s is not None and cost.without.tpot_s is not None
    assert cost.predicted.tpot_s - cost.without.tpot_s == pytest.approx(3 * 0.002)
    checks = found.split.spot_checks
    assert checks.checked >= TOKENS and not checks.mismatches
    print_comparison(found)
    assert [shown.snapshot and shown.snapshot.address for shown in seen] == [hop.addresses[0] for hop in hops]
    assert all(f"layers [{hop.plan.start}, {hop.plan.end}) of 6" in cards(seen) for hop in hops)
    drawn, printed = waterfall.picture(found.pairs), capsys.readouterr().out
    for hop in hops:
        assert f"[{hop.plan.start}, {hop.plan.end}) wire" in printed
        assert f"[{hop.plan.start}, {hop.plan.end}) trunk" in drawn


def test_a_run_through_servers_that_forward_has_the_figures_of_each(hops: Sequence[Hop], files: ModelFiles) -> None:
    parsed = config.parse(settings(files, trunk={"address": links_of(hops), "verify": 0.5}))
    with Runs(parsed, silent) as runs:
        flags = FlagSet(CACHED, CACHED, CACHED)
        *_, report = runs.stream("split", flags, GenerationRequest(PROMPT, TOKENS, ignore_eos=True))
    assert isinstance(report, ArmReport)
    assert [facts.address for facts in report.hops] == [hop.addresses[0] for hop in hops]
    assert all(facts.peak_rss_bytes > facts.import_rss_bytes > 0 for facts in report.hops)
    assert report.metrics.hops.keys() == {(plan.start, plan.end) for plan in THREE}
    assert report.spot_checks.checked >= TOKENS // 2 and not report.spot_checks.mismatches


def links_of(hops: Sequence[Hop]) -> list[dict[str, Any]]:
    """The chain as it stands in config.yaml."""
    return [{"layers": [hop.plan.start, hop.plan.end], "address": hop.addresses[0]} for hop in hops]


LAYERS: list[dict[str, Any]] = [{"layers": [1, 3], "address": "a:1"}, {"layers": [3, 5], "address": ["b:2", "c:3"]}]


def with_link(**changes: object) -> list[dict[str, Any]]:
    """The chain with another second link."""
    return [LAYERS[0], {**LAYERS[1], **changes}]


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (with_link(layers=[4, 5]), r"link 2: '\[4, 5\) at b:2 or c:3'.*from 3 on.*\[3, 4\) would be in none"),
        (with_link(layers=[2, 5]), r"link 2: '\[2, 5\) at b:2 or c:3'.*from 3 on.*\[2, 3\) would be in both"),
        (with_link(layers=[3, 3]), r"link 2: layers: \[3, 3\].*0 <= start < end"),
        (with_link(layers=[3]), r"link 2: layers"),
        (with_link(address=["b:2", "A:1"]), r"link 2: .*each server in one link: a:1 is in link 1"),
        (with_link(address="nowhere"), r"link 2: address: 'nowhere'.*host:port"),
        (with_link(address="embedded"), r"link 2: address: 'embedded'.*running servers"),
        (with_link(addres="b:2"), r"link 2: config key: 'addres'.*layers, address"),
        ([LAYERS[0], "b:2"], r"link 2: 'b:2'.*layers and address"),
    ],
)
def test_a_bad_chain_is_refused_by_the_number_of_its_link(chain: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^trunk\\.address, {said}") as told:
        config.parse({"trunk": {"address": chain}})
    assert "\n" not in str(told.value)


def test_a_chain_has_the_split_of_its_links_and_no_other() -> None:
    parsed = config.parse({"trunk": {"address": LAYERS}})
    assert config.parse(parsed.model_dump()) == parsed
    assert parsed.trunk.place == "[1, 3) at a:1, [3, 5) at b:2 or c:3"
    assert plan_of(parsed, 6) == SplitPlan(1, 5, 6)
    with pytest.raises(InputError, match=r"trunk\.address, link 2: .*up to 4"):
        plan_of(parsed, 4)
    for split, said in (({"start": 2}, r"split\.start: 2 .*1 or null"), ({"end": 6}, r"split\.end: 6 .*5 or null")):
        with pytest.raises(InputError, match=said):
            plan_of(config.parse({"trunk": {"address": LAYERS}, "split": split}), 6)


@pytest.mark.parametrize("how", ["another model", "other layers", "unreachable", "dies"])
def test_a_server_that_cannot_be_used_is_named_with_its_link(
    how: str, hops: Sequence[Hop], files: ModelFiles, tiny_model: TinyFactory
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    with serve_here(tiny_model("gpt2"), "trunk:none", {}, (2, 4)) as other, proxy(dead) as closes:
        address, kind, said = {
            "another model": (other.address, TrunkRefused, "digest"),
            "other layers": (hops[0].addresses[0], TrunkRefused, r"layer"),
            "unreachable": (dead, TrunkUnavailable, "does not answer"),
            "dies": (closes.address, TrunkUnavailable, "does not answer"),
        }[how]
        hop = replace(hops[1], addresses=(address,))
        whole = served(files, SplitPlan(1, 5, 6))
        named = rf"^Link 2 of 3, layers \[2, 4\): The trunk server at {address} .*{said}"
        with pytest.raises(kind, match=named):
            hop.check(whole)
        forwarding = ForwardingChain([hops[0], hop, hops[2]], whole, 20)
        for stage in (RemoteStage(hop.addresses, hop.of(whole), 20), RemoteStage((), whole, 20, chain=forwarding)):
            with closing(stage), pytest.raises(kind, match=named) as told:
                stage.open(session_of(CACHED), 16)
            assert str(told.value).count("Link 2 of 3") == 1
