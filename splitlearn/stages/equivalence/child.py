"""Runs one family's test in a process of its own: if it hangs, crashes or is huge, that is a line in the table."""

import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from splitlearn.stages.equivalence.compare import Result, prove

LIMIT_S = 300.0
LIMIT_BYTES = 3 * 2**30


def prove_apart(
    context: ForkServerContext,
    family: str,
    architecture: str,
    work: Callable[[str, Connection], None] | None = None,
    limit_s: float = LIMIT_S,
) -> Result:
    """One family's result from a process of its own. A process that ends late, or without a result, is a refusal."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work or _work, args=(family, sender), daemon=True)
    process.start()
    sender.close()
    reason = f"its proof did not end within {limit_s:.0f} s"
    try:
        if receiver.poll(limit_s):
            result: Result = receiver.recv()
            return result
    except EOFError:
        reason = f"its proof ended without a result (crashed, or took more than {LIMIT_BYTES / 2**30:.0f} GiB)"
    finally:
        process.kill()
        process.join()
    return Result(family, architecture, False, None, reason)


def _work(family: str, sender: Connection) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        config = AutoConfig.for_model(family)
    except Exception as error:  # some configurations have no defaults that their own validation accepts
        line = str(error).strip().splitlines()[-1].strip()
        sender.send(Result(family, "", False, None, f"its default configuration cannot be made: {line}"))
        return
    sender.send(prove(config))
