"""Programs of this project as child processes: found beside this package, never in the current folder.

A user's folder may have a server.py or a config.yaml of its own. So children start in Python's safe-path mode, which
leaves the current folder out, and a checkout's packages are named by PYTHONPATH.
"""

import os
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from pkgutil import resolve_name
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Where the packages splitlearn, server and ui lie: a checkout, or site-packages."""


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` with this interpreter."""
    return [sys.executable, "-P", "-m", module, *arguments]


def spoken() -> str:
    """How a user calls this interpreter from the current folder: `.venv/bin/python` in a checkout, else `python`."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else "python"


def this_command() -> str:
    """The command line that started this program, for a person to repeat."""
    return shlex.join([spoken(), "-m", "splitlearn", *sys.argv[1:]])


def environment() -> dict[str, str]:
    """The environment for `command`, and for interpreters that it starts in its turn."""
    known = {Path(path).resolve() for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))}
    paths = [] if ROOT in known else [str(ROOT)]  # an installed package is found without
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


_environment_lock = Lock()  # two threads that start children at once would each restore what the other had set


@contextmanager
def as_parent() -> Iterator[None]:
    """Have what is started inside, by a library that takes no environment, get that of `environment`."""
    with _environment_lock:
        before = dict(os.environ)
        os.environ.update(environment())
        try:
            yield
        finally:
            for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
                if name in before:
                    os.environ[name] = before[name]
                else:
                    os.environ.pop(name, None)


def own(name: str) -> Any:
    """The object `name` ("module:object") of this project, in a child process that has its parent's main module and
    path: these may have another module of that name, which is then forgotten here."""
    package = name.partition(":")[0].partition(".")[0]
    loaded = sys.modules.get(package)
    if ROOT / package not in [Path(folder).resolve() for folder in getattr(loaded, "__path__", ())]:
        for other in [each for each in sys.modules if each.partition(".")[0] == package]:
            del sys.modules[other]
        spec = PathFinder.find_spec(package, [str(ROOT)])
        assert spec is not None and spec.loader is not None, f"{ROOT} has no package {package}"
        sys.modules[package] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return resolve_name(name)


def own_config() -> Path | None:
    """The config.yaml of the checkout that this program runs from, if it does; none of any other folder."""
    path = ROOT / "config.yaml"
    return path if path.exists() and (ROOT / "app.py").exists() else None
