"""Imports go down only.

LAYERS is the order of the program, lowest first. A module may import from the layers below its own, not from its own
and not from above; the modules of one package (wire, proof, lab) count as one and may import each other. Imports inside
functions count, too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("address", "cgroups", "home", "proxies", "sources", "terminal"),
    ("blocks", "breaker", "drafts", "errors", "jit", "native", "progress", "stop", "team", "threads", "watchdog"),
    ("attention", "caches", "config", "families", "machine", "plan", "prepacked"),
    ("process", "products", "sampling", "store"),
    ("block_linear", "chat", "checkpoint", "phases", "ports", "rope", "row_attention", "wire"),
    ("adapter", "conformance", "events", "parted_head", "row_kernel", "sampler", "split", "tokens"),
    ("compiling", "convert", "finite", "generation_settings", "kv", "one_row"),
    ("graphs", "stage_settings"),
    ("packed",),
    ("packable", "proof", "stages"),
    ("chain", "fetch", "flags", "local_stage", "metrics", "parts"),
    ("embedded", "ledger", "loading", "models", "selection", "stream"),
    ("draft_model", "flags_page", "head_start", "trunks"),
    ("generate", "remote"),
    ("arm", "watch"),
    ("worker",),
    ("runs",),
    ("compare",),
    ("console", "lab"),
    ("load",),
    ("__main__",),
    ("server", "ui"),
    ("app",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGES = ("splitlearn", "server", "ui")
NOT_IMPORTED = ("bench", "tests")


def _files() -> list[Path]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted([*found, *ROOT.glob("app.py")])


def _unit(module: str) -> str:
    """What LAYERS calls `module`: the part of splitlearn that it belongs to, or the package server, ui, or app."""
    head, *rest = module.split(".")
    return (rest[0] if rest else "__init__") if head == "splitlearn" else head


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and name of every module of this project that is imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        head = ""
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, so that this test can read it"
            head = f"{node.module}."
        for alias in node.names:
            if (head + alias.name).split(".")[0] in (*PACKAGES, *NOT_IMPORTED, "app"):
                yield node.lineno, head + alias.name


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = _unit(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here in (*RANK, "__init__"), f"{here} is not in LAYERS of {__file__}: add it to the layer that it belongs to"
    rank = RANK.get(here, -1)  # splitlearn/__init__.py is below all: it imports nothing of this project
    wrong = [
        f"line {line}: {here} imports {name}"
        for line, name in _imported(ast.parse(path.read_text(encoding="utf-8")))
        if _unit(name) != here and RANK.get(_unit(name), len(LAYERS)) >= rank
    ]
    assert not wrong, f"{path.relative_to(ROOT)} imports what is not below it: {'; '.join(wrong)}"


def test_every_name_in_the_table_is_a_module() -> None:
    expected = {_unit(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in _files()} - {"__init__"}
    assert set(RANK) == expected
