"""`python -m splitlearn.proof`: try every causal LM family of the installed transformers, and write what was found.

Writes splitlearn/proven_families.json and docs/families.md. About four minutes on two cores.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from splitlearn.progress import bars_on, label_column
from splitlearn.proof.apart import prove_apart
from splitlearn.proof.compare import Result
from splitlearn.proof.page import PAGE, families_page
from splitlearn.proof.proven import DATA, proven, write
from splitlearn.terminal import console, say

WORKERS = 2


def main() -> None:
    """Run the proof of all families, and write the data and the page."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["splitlearn.proof"])
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
