"""pyproject.toml declares what the code imports, and nothing that no code uses."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Modules whose package has another name.
PACKAGES = {"PIL": "pillow", "google": "protobuf", "sklearn": "scikit-learn"}
# What the Makefile or CONTRIBUTING.md runs, and how.
TOOLS = {
    "mypy": "$(BIN)/mypy",
    "pre-commit": ".venv/bin/pre-commit install",
    "pytest-benchmark": "--benchmark-only",
    "pytest-xdist": "--dist loadfile",
    "ruff": "$(BIN)/ruff check",
}
# Used otherwise: onnxruntime for a GPU, torch.onnx's own need, and a schema that a test reads from its folder.
USED = {"onnxruntime-gpu", "onnxscript", "tritonclient"}
# A rival of the bench's, which is timed where it is installed.
UNDECLARED = {"torch-tensorrt"}


def imported():
    """Packages that Python files of the project import, by the names that pip knows."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own, found = {"fastddim"}, set()
    for path in map(Path, files.split()):
        # The package's modules are imported by their whole names, and one may be called like what it wraps.
        if path.parts[0] != "fastddim":
            own.add(path.parent.name if path.name == "__init__.py" else path.stem)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return {PACKAGES.get(name, name.replace("_", "-")) for name in found - own - set(sys.stdlib_module_names)}


def declared():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    optional = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r'"([\w-]+)[^"\[]*"', required + optional))


def test_what_is_imported_is_declared():
    assert imported() - UNDECLARED <= declared()


def test_what_is_declared_is_used():
    pages = "".join((ROOT / name).read_text() for name in ("Makefile", "CONTRIBUTING.md"))
    assert declared() - imported() == USED | TOOLS.keys()
    assert [name for name, said in TOOLS.items() if said not in pages] == []
