"""The house plan: imports only point down, and the core needs torch, einops and opt-einsum alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megablocks

PACKAGE = Path(megablocks.__file__).parent
FLOORS = {
    "_checks": 0,
    "state": 0,
    "kernels": 1,
    "functional": 2,
    "layers": 3,
    "stacks": 4,
    "models": 5,
    "huggingface": 6,
    "interop": 6,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def floor(module: str) -> int | None:
    """The floor of `megablocks.<room>...`, None for the package itself and for other packages."""
    package, *rooms = module.split(".")
    return FLOORS[rooms[0]] if package == "megablocks" and rooms and rooms[0] in FLOORS else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            assert (floor(module) or 0) <= own, f"{path}:{node.lineno} imports upward: {module}"
            assert own == 6 or module.split(".")[0] != "transformers", f"{path}:{node.lineno} imports transformers"


def test_the_core_imports_nothing_else():
    program = """
import sys
before = set(sys.modules)
import torch, einops, opt_einsum
known = {name.split(".")[0] for name in sys.modules}
import megablocks
extra = {name.split(".")[0] for name in sys.modules} - known - {"megablocks"} - set(sys.stdlib_module_names)
print(",".join(sorted(extra)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
