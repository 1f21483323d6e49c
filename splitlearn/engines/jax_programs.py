"""Compiles the programs of a stage, each once, and lets JAX keep them for the next process that needs the same.

They are kept beside the model's folder, in `<folder>.jax/`, apart for processors with other instructions. JAX knows a
program by its text, its versions and its settings. Programs that cannot be read are dropped and compiled anew.
"""

import hashlib
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.runtime import hardware

DONATED = 1
"""The argument of a step whose memory its results take: keys and values."""
Key = tuple[int, ...]


class Programs:
    """A stage's programs by the shapes of their arguments. `compile_s` counts seconds of tracing and compiling."""

    def __init__(self) -> None:
        self.compile_s = 0.0
        self._compiled: dict[Key, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The program of `function` for arguments of the shapes of `arguments`, which `key` stands for."""
        if key not in self._compiled:
            with self._lock:
                began = time.perf_counter()
                self._compiled[key] = self._compiled.get(key) or _compiled(function, arguments)
                self.compile_s += time.perf_counter() - began
        return self._compiled[key]


def keep(files: ModelFiles) -> None:
    """Let JAX keep programs beside the folder of `files`, if it can be written. The first call in a process decides."""
    machine = hashlib.sha256(hardware.instruction_sets().encode()).hexdigest()[:12]
    folder = files.folder.with_name(f"{files.folder.name}.jax") / machine
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # they are compiled at each start
        return
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    lowered = jax.jit(function, donate_argnums=DONATED).lower(*arguments)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        program: Callable[..., Any] = lowered.compile()
    if any("persistent compilation cache" in str(each.message) for each in said):
        _drop(Path(jax.config.jax_compilation_cache_dir))
    return program


def _drop(folder: Path) -> None:
    """Remove what is kept, of which something cannot be read: JAX would neither read nor replace it at each start."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
