"""One answer of an arm, in figures; and the flags of measurements in which both ends are as fast as float32 allows."""

from splitlearn.arm import Kind
from splitlearn.events import GenerationRequest
from splitlearn.metrics import RunMetrics
from splitlearn.runs import ArmReport, Runs
from splitlearn.selection import FlagSet

FAST = "low_cpu_mem_usage,inference_mode,use_cache,cache,weight_prepack,output_attentions,output_hidden_states"


def answer(runs: Runs, kind: Kind, flags: FlagSet, request: GenerationRequest) -> RunMetrics:
    """Run `request` through one arm."""
    return next(item for item in runs.stream(kind, flags, request) if isinstance(item, ArmReport)).metrics
