"""`python -m splitlearn.proof`: try every causal LM family of the installed transformers, and write what was found.

Writes splitlearn/proven_families.json and docs/families.md. About four minutes on two cores.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from splitlearn.proof.apart import prove_apart
from splitlearn.proof.compare import Result
from splitlearn.proof.page import PAGE, families_page
from splitlearn.proof.proven import DATA, proven, write

WORKERS = 2


def main() -> None:
    """Run the proof of all families, and write the data and the page."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    console = Console(stderr=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["splitlearn.proof"])
    architectures = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(WORKERS) as pool:
        task = progress.add_task("proving", total=len(architectures))

        def one(family: str) -> Result:
            result = prove_apart(context, family, str(architectures[family]))
            progress.update(task, advance=1, description=f"{family}: {'exact' if result.exact else 'refused'}")
            return result

        results = list(pool.map(one, architectures))
    write(results)
    PAGE.write_text(families_page(proven()))
    console.print(f"{len(proven()['families'])} families proven: {DATA} and {PAGE} written")


if __name__ == "__main__":
    main()
