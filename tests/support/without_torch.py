"""Runs `app.py` in a process that cannot import torch or transformers: the page's process must never need them.

Its workers are other processes, and can. As a script this module runs in a fresh interpreter. `forked` runs in a fork
of a process that has all imports of page and workers. It unloads the modules that a page does not need, and this
project's own, which are then imported again. Experiments of a forked page take fewer prefills: what they time is of no
interest.
"""

import atexit
import sys
from importlib import import_module, reload
from importlib.abc import MetaPathFinder
from pathlib import Path

FORBIDDEN = ("torch", "transformers")
PROJECT = ("splitlearn", "server", "ui", "app")


class Refuser(MetaPathFinder):
    """Refuses to import the packages in FORBIDDEN."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in FORBIDDEN:
            raise ImportError(f"the page's process imports {name}")


def forked(_arguments: list[str]) -> int:
    """Run `python app.py` in a fork, which has its arguments in sys.argv."""
    from tests.support.light import LIGHT

    light = LIGHT | sys.stdlib_module_names
    dropped = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in PROJECT or not {name, name.partition(".")[0]} & light
    }
    for name in dropped:
        del sys.modules[name]
    _read_environment()
    atexit._clear()
    import_module("splitlearn.lab.experiment").PREFILLS = 2  # type: ignore[attr-defined]  # the module has it
    try:
        return _launch()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end; a fork does not


def _read_environment() -> None:
    """Let Gradio read where its tunnel's client and server are, as it does on import."""
    tunneling = reload(import_module("gradio.tunneling"))
    reload(import_module("gradio.networking"))
    import_module("gradio.blocks").CURRENT_TUNNELS = tunneling.CURRENT_TUNNELS  # type: ignore[attr-defined]  # ended with the page


def _launch() -> int:
    sys.meta_path.insert(0, Refuser())
    from app import main

    return main()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(_launch())
