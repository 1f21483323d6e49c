"""`python -m splitlearn.stages.equivalence`: test every causal LM family of the installed transformers.

Writes the results to splitlearn/stages/proven_families.json and docs/families.md. About four minutes on two cores.
"""

import argparse
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from splitlearn.runtime.console import bars_on, console, label_column
from splitlearn.runtime.terminal import say
from splitlearn.stages.equivalence.child import prove_apart
from splitlearn.stages.equivalence.compare import Result
from splitlearn.stages.equivalence.page import PAGE, families_page
from splitlearn.stages.equivalence.proven import DATA, proven, write

WORKERS = 2


def main() -> None:
    """Test all families, and write the data and the page."""
    argparse.ArgumentParser("python -m splitlearn.stages.equivalence", description=__doc__).parse_args()  # it has none
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["splitlearn.stages.equivalence"])
    architectures = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    columns = (label_column(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bars_on(console(stderr=True), *columns) as progress, ThreadPoolExecutor(WORKERS) as pool:
        task = progress.add_task("proving", total=len(architectures))

        def one(family: str) -> Result:
            result = prove_apart(context, family, str(architectures[family]))
            progress.update(task, advance=1, description=f"{family}: {'exact' if result.exact else 'refused'}")
            return result

        results = list(pool.map(one, architectures))
    write(results)
    PAGE.write_text(families_page(proven()))
    say(f"{len(proven()['families'])} families proven: {DATA} and {PAGE} written", stderr=True)


if __name__ == "__main__":
    main()
