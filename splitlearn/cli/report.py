"""`splitlearn report`: an experiment again, or two beside each other."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime.command_line import Job, real

Experiments = Annotated[list[Path], typer.Argument(metavar="DIR [DIR]", help="one folder of `lab`, or two")]
Ttft = Annotated[
    float | None, typer.Option(metavar="S", parser=real("ttft"), help="service level in seconds (default: 0.5)")
]
Tps = Annotated[
    float | None, typer.Option(metavar="N", parser=real("tps"), help="service level, decoding (default: 20)")
]


def report(experiments: Experiments, ttft: Ttft = None, tps: Tps = None, as_json: options.Json = False) -> Job:
    """Show an experiment of `lab`, or compare two."""
    if len(experiments) > 2:
        raise InputError("experiments", len(experiments), "one folder, or two to compare")
    if len(experiments) == 2 and (as_json or ttft is not None or tps is not None):
        raise InputError("experiments", 2, "one folder with --json, --ttft or --tps")
    from splitlearn.cli import lab_run
    from splitlearn.lab.analysis.pairing import ServiceLevel

    level = ServiceLevel(**options.given(ttft_s=ttft, decode_tps=tps))
    return partial(lab_run.show, experiments, level, as_json=as_json)
