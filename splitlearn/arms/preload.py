"""What every worker process needs, imported once, in the fork server (runtime/process.py) that workers are forked from.

The garbage collector rests meanwhile, and never looks at these objects: a worker that did would copy their memory.
"""

import logging
from importlib import import_module

from splitlearn.runtime import collector, private_apis

MODULES = (
    "splitlearn.arms.worker_main",
    # transformers would import its larger half on first use.
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "transformers.convert_slow_tokenizer",
)
KERNELS = "splitlearn.kernels.llama_decode"
"""Loads a compiler. To import it starts no thread, which would not be there in a fork."""


def _import_all() -> None:
    private_apis.without_scipy()
    for name in MODULES:
        import_module(name)
    try:
        import_module(KERNELS)
    except Exception as error:  # the worker that needs it fails with its reason
        logging.getLogger(__name__).warning("The kernels cannot be imported: %s", error)


with collector.resting():
    _import_all()
