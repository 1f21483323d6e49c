"""Imports go down only: a package may import from those below it, and from itself.

ORDER is the order of splitlearn's packages, lowest first. The modules at the root (errors, config, events, sampling,
metrics) are below all packages. server and ui are above splitlearn, and never meet. Imports inside functions count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    "runtime",
    "kernels",
    "models",
    "checkpoints",
    "wire",
    "access",
    "kvcache",
    "layers",
    "stages",
    "engines",
    "scheduling",
    "generation",
    "flags",
    "client",
    "link",
    "arms",
    "planning",
    "reporting",
    "privacy",
    "lab",
    "loadtest",
    "openai_api",
    "cli",
)
PROGRAMS = ("server", "ui", "app")
NOT_IMPORTED = ("bench", "tests")
ALONE = ("kernels",)
"""Packages that import nothing of the project, not even the root's modules."""


def _files() -> list[Path]:
    found = [path for package in ("splitlearn", "server", "ui") for path in (ROOT / package).rglob("*.py")]
    return sorted([*found, *ROOT.glob("app.py")])


def _place(module: str) -> str:
    """What ORDER calls the place of `module`: a package of splitlearn, "root", or a program."""
    head, *rest = module.split(".")
    if head != "splitlearn":
        return head
    if rest and rest[0] in ("__main__", "__init__"):
        return rest[0]
    return rest[0] if rest and (ROOT / "splitlearn" / rest[0]).is_dir() else "root"


def _below(place: str) -> tuple[str, ...]:
    """The places that `place` may import."""
    if place in ALONE:
        return (place,)
    if place in ("root", *ORDER):
        return ("root", *ORDER[: ORDER.index(place) + 1 if place in ORDER else 0])
    own = {"app": ("ui",), "__main__": (), "__init__": ()}.get(place, (place,))
    return ("root", *ORDER, *own)


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
            if (head + alias.name).split(".")[0] in ("splitlearn", *PROGRAMS, *NOT_IMPORTED):
                yield node.lineno, head + alias.name


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = _place(".".join(path.relative_to(ROOT).with_suffix("").parts))
    wrong = [
        f"line {line}: {here} imports {name}"
        for line, name in _imported(ast.parse(path.read_text(encoding="utf-8")))
        if _place(name) not in _below(here)
    ]
    assert not wrong, f"{path.relative_to(ROOT)} imports what is not below it: {'; '.join(wrong)}"


def test_every_package_has_its_place_in_the_order() -> None:
    assert set(ORDER) == {path.parent.name for path in (ROOT / "splitlearn").glob("*/__init__.py")}
