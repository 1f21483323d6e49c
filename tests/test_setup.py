"""What the program imports is what requirements.txt pins; what is generated is what its source gives."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from splitlearn.flags.docs_page import markdown
from tests.support.children import output_of

ROOT = Path(__file__).parents[1]
OURS = {"splitlearn", "server", "ui", "app"}
# Never imported by name, but transformers asks for them: see requirements.txt.
OPTIONAL = {
    "requirements-ray.txt": {"ray"},
    "requirements-onnx.txt": {"onnx", "onnxruntime", "onnxscript"},
    "requirements-jax.txt": {"jax", "torchax"},
}
WITH_OTHERS = {"onnx_ir"}  # onnxscript's own requirement
PROTO = ("splitlearn/wire/trunk.proto", "splitlearn/wire/directory.proto")
FOR_TRANSFORMERS = {"accelerate", "gguf", "sentencepiece", "tokenizers"}


def _pins(name: str) -> dict[str, str]:
    """The packages of a requirements file, in lower case with dashes, and their exact versions."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    wanted = [line.split("==") for line in lines if line and not line.startswith(("#", "-"))]
    return {package.lower().replace("_", "-"): version for package, version in wanted}


def _imported_modules() -> set[str]:
    """Every module, by its full name, that the program's own code imports from outside."""
    files = [path for package in ("splitlearn", "server", "ui") for path in (ROOT / package).rglob("*.py")]
    names = set()
    for path in [*files, *ROOT.glob("app.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return {name for name in names if name.split(".")[0] not in OURS | sys.stdlib_module_names}


def _distributions(modules: set[str]) -> set[str]:
    """The packages that `modules` come from."""
    packages = packages_distributions()
    # google is a namespace that other packages share
    found = [["protobuf"] if name.startswith("google.protobuf") else packages[name.split(".")[0]] for name in modules]
    return {name.lower().replace("_", "-") for names in found for name in names}


def test_requirements_pin_exactly_what_the_program_imports() -> None:
    optional = WITH_OTHERS.union(*OPTIONAL.values())
    imported = {name for name in _imported_modules() if name.split(".")[0] not in optional}
    assert set(_pins("requirements.txt")) == _distributions(imported) | FOR_TRANSFORMERS
    assert all(set(_pins(name)) >= packages for name, packages in OPTIONAL.items())


def test_no_package_is_pinned_twice() -> None:
    assert not set(_pins("requirements.txt")) & set(_pins("requirements-test.txt"))


def test_generated_protocol_code_is_what_the_proto_file_gives(tmp_path: Path) -> None:
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, *PROTO]
    output_of(protoc)
    for made in (tmp_path / "splitlearn/wire").iterdir():
        kept = ROOT / "splitlearn/wire" / made.name
        assert kept.read_text() == made.read_text(), f"{kept.name} is not current: run make proto"


def test_the_page_of_the_flags_is_what_the_registry_gives() -> None:
    assert (ROOT / "docs/flags.md").read_text(encoding="utf-8") == markdown(), "run make docs"
