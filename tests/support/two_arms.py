"""A program such as the page: an embedded trunk and a worker for each arm."""

import signal

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent

CACHED = frozenset({"use_cache"})
FLAGS = FlagSet(CACHED, CACHED, CACHED)


def main(arguments: list[str]) -> int:
    """Run both arms with the config in the first argument, and print `running`. Then wait, or go on with runs if the
    second argument is `busy`."""
    with Runs(config.Config.model_validate_json(arguments[0]), silent) as runs:
        for kind in ("full", "split"):
            list(runs.stream(kind, FLAGS, GenerationRequest("Hello", max_new_tokens=4)))
        print("running", flush=True)
        while arguments[1] == "busy":
            list(runs.stream("split", FLAGS, GenerationRequest("Hello", max_new_tokens=400, ignore_eos=True)))
        signal.pause()
    return 0
