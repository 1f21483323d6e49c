"""What a client does to the hidden states that it sends: as much as it says, reproducible, and never drawn twice."""

from dataclasses import replace

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from splitlearn.flags.registry import FLAGS, SIDES, Place
from splitlearn.flags.selection import PRESETS, availability, parse
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.relay import Relay
from splitlearn.sampling import SamplingParams
from splitlearn.stages.defences import Defended, GaussianNoise, TopK
from tests.support.client import CACHED, client
from tests.support.trunk import TrunkHere

TOKENS = 4
REQUEST = GenerationRequest("The sky is blue, and", TOKENS, chat=False, ignore_eos=True)
DEFENCES = [name for name, flag in FLAGS.items() if flag.defence]


def sent(files: ModelFiles, here: TrunkHere, *words: str, seed: int = 0, cached: bool = True) -> Capture:
    """What a real server has of a client with the flags `words`."""
    request, trunk = replace(REQUEST, sampling=SamplingParams(seed=seed)), CACHED if cached else CACHED - {"use_cache"}
    with Relay(here.address) as relay, client(files, relay.address, trunk=trunk, own=trunk | set(words)) as victim:
        assert len(victim.ask(request).token_ids) == TOKENS
    (recorded,) = relay.sessions
    return recorded.capture()


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_is_a_lossy_flag_of_the_client_that_no_set_has_and_its_help_says_what_it_is_not(name: str) -> None:
    here, flag = availability(dict.fromkeys(SIDES, Place("cpu"))), FLAGS[name]
    for choice in list(flag.choices)[1:]:
        flags = parse(f"client:{name}={choice}", here)
        assert len(flags.client) == 1
        assert not any(name in text for side in ("full", "trunk") for text in parse(f"{name}={choice}", here).of(side))
    assert not any(name in parse(word, here).names() for word in ("auto", "default", "all", *PRESETS))
    assert "not private" in flag.help and flag.fidelity == "lossy"


def test_noise_has_the_deviation_that_it_says_follows_from_the_seed_and_differs_at_each_position(
    files: ModelFiles, here: TrunkHere
) -> None:
    clean, noisy = sent(files, here).sent, sent(files, here, "gaussian_noise=0.1").sent
    prompt = len(clean) - TOKENS + 1  # the tokens behind it may differ
    noise = (noisy - clean)[:prompt]
    robust = clean[:prompt].abs().median(dim=1).values / 0.6745
    assert torch.allclose(noise.std(dim=1) / robust, torch.tensor(0.1), rtol=0.3)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.6
    assert torch.equal(sent(files, here, "gaussian_noise=0.1").sent, noisy)
    assert not torch.equal(sent(files, here, "gaussian_noise=0.1", seed=1).sent[:prompt], noisy[:prompt])


def test_without_a_kv_cache_a_row_that_is_sent_again_has_the_noise_that_it_had(
    files: ModelFiles, here: TrunkHere
) -> None:
    first = sent(files, here, "gaussian_noise=0.3").sent
    again = sent(files, here, "gaussian_noise=0.3", cached=False).sent
    assert torch.allclose(first, again, atol=1e-4)


def test_sparsification_sends_the_largest_values_of_each_row_and_zeros(files: ModelFiles, here: TrunkHere) -> None:
    clean, sparse = sent(files, here).sent, sent(files, here, "topk_sparsification=0.25").sent
    row, other = clean[0], sparse[0]
    kept = other != 0
    assert int(kept.sum()) == len(row) // 4
    assert torch.equal(other[kept], row[kept])
    assert row[~kept].abs().max() <= row[kept].abs().min()


def test_few_huge_values_do_not_set_the_noise_of_a_row() -> None:
    row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    huge = row.clone()
    huge[0, :3] = 1e4
    deviation, other = (float(GaussianNoise(0.5).deviation(x)) for x in (row, huge))
    assert abs(deviation - 0.5) < 0.05
    assert abs(other / deviation - 1) < 0.02


def test_another_token_at_a_position_has_another_draw_and_the_same_token_the_same() -> None:
    sample, row = Defended((GaussianNoise(1.0), TopK(0.5)), seed=7), torch.ones(1, 1, 64)
    sample.feed(0, [1, 2])
    drawn = []
    for token in (3, 4, 3):  # a draft that did not come true, and back
        sample.feed(2, [token])
        drawn.append(sample.sent(row, 3))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    fork = Defended(sample.defences, seed=7)
    fork.fork(sample, 2)
    fork.feed(2, [3])
    assert torch.equal(fork.sent(row, 3), drawn[0])
