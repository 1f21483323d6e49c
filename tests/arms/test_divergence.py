"""Where two arms part: the candidates that each had there."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from splitlearn import config
from splitlearn.arms.compare import compare
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams
from tests.conftest import TinyFactory
from tests.support.trunk import settings

CACHED = frozenset({"use_cache", "inference_mode"})
LOSSY = FlagSet(CACHED, CACHED | {"prompt_lookup"}, CACHED | {"wire_dtype"})
REQUEST = GenerationRequest("Why is the sky blue?", max_new_tokens=200, ignore_eos=True)
DRAWN = replace(REQUEST, samples=2, sampling=SamplingParams(temperature=0.8, seed=5))


@pytest.fixture(scope="module")
def runs(tiny_model: TinyFactory) -> Iterator[Runs]:
    with Runs(config.parse(settings(tiny_model("llama"))), silent) as made:
        yield made


@pytest.mark.parametrize("request_", [REQUEST, DRAWN])
def test_arms_that_part_show_the_candidates_of_each_and_the_chosen_ones_among_them(
    runs: Runs, request_: GenerationRequest
) -> None:
    found = compare(runs, request_, LOSSY)
    assert found is not None
    differ = found.pairs.divergence
    assert differ is not None
    said = found.as_json()["divergence"]
    assert (said["position"], said["sample"], said["repeatable"]) == (differ.at, differ.sample, True)
    for kind, report in (("full", found.full), ("split", found.split)):
        listed = said[kind]
        (chosen,) = [each for each in listed if each["chosen"]]
        assert chosen["token_id"] == report.samples[differ.sample].token_ids[differ.at]
        assert 5 <= len(listed) <= 7
        assert [each["logit"] for each in listed] == sorted((each["logit"] for each in listed), reverse=True)
        assert all(each["logprob"] < 0 for each in listed)
        if request_.sampling.greedy:
            assert chosen is listed[0]
