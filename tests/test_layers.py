"""The arrows of the package, read from the syntax trees: imports point down, and each foreign package has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "isomerge"

LEVELS = (  # from the bottom; a module may import from lower levels, and from its own package
    {"errors", "memory"},
    {"backends", "settings", "checkpoint", "overlap", "place", "recipe_text"},
    {"ops"},
    {"methods", "deltas", "families", "nonfinite", "recipe", "statistics"},
    {"direct", "headers", "schedule", "moments"},
    {"delta_reader"},
    {"assignments"},
    {"plan", "spool"},
    {"report", "surveys"},
    {"output", "tally"},
    {"run"},
    {"estimate"},
    {"merge", "capture", "inspect", "verify"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

DOORS = {
    "pydantic": {"recipe"},
    "yaml": {"recipe"},
    "typer": {"cli"},
    "rich": {"cli"},
    "triton": {"backends/triton"},
    "scipy": {"backends/lapack"},
    "safetensors": {"checkpoint"},
    "isal": {"checkpoint/files"},
    "transformers": {"capture"},
    "tokenizers": {"capture"},
    "PIL": {"capture"},
    "matplotlib": {"inspect/picture"},
    "numpy": set(),
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path, tree: ast.AST) -> list[str]:
    """Dotted names of everything that a module imports, at any depth of the code."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def place(path: Path) -> str:
    """The name by which `LEVELS` knows a module: its top-level part."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path, source: str) -> list[str]:
    own, found = place(path), []
    tree = ast.parse(source)
    for name in imported(path, tree):
        root, *rest = name.split(".")
        if root == "isomerge" and rest and rest[0] not in (own, "__version__"):
            if LEVEL[rest[0]] >= LEVEL[own]:
                found.append(f"{own} imports {name}, which is not below it")
            if own == "methods" and rest[0] not in ("ops", "errors"):
                found.append(f"methods import {name}; they know tensors and ops alone")
        if own == "backends" and path.stem != "reference" and name.startswith("isomerge.backends.reference"):
            found.append(f"{path.stem} imports the reference, which is for tests to compare with")
        if root in DOORS and not any(str(path.relative_to(PACKAGE)).startswith(door) for door in DOORS[root]):
            found.append(f"{own} imports {name}; its door is {DOORS[root] or 'none'}")
    if own != "cli":
        found += [
            f"{own} prints"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert place(path) in LEVEL, "a new module needs a level"
    assert violations(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.py", "from isomerge.methods import METHODS"),
        ("checkpoint/reader.py", "def f():\n    from isomerge.deltas import Group"),
        ("methods/iso.py", "from isomerge.backends import eager"),
        ("backends/eager.py", "from isomerge.backends.reference import polar"),
        ("plan.py", "import pydantic"),
        ("merge.py", "print('done')"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(PACKAGE / module, source)


BLOCKED = (
    "pydantic",
    "yaml",
    "typer",
    "rich",
    "click",
    "triton",
    "safetensors",
    "numpy",
    "scipy",
    "transformers",
    "psutil",
    "PIL",
    "matplotlib",
)
CODE = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
import torch, isomerge
deltas = torch.randn(2, 6, 4)
assert isomerge.methods.iso_c(deltas).shape == (6, 4)
base = {{"w": torch.zeros(6, 4), "b": torch.zeros(6)}}
experts = [{{"w": delta, "b": torch.ones(6)}} for delta in deltas]
merged = isomerge.merge_state_dicts(base, experts, method="tsvm", alpha=0.5)
assert merged["b"].eq(0.5).all() and merged["w"].shape == (6, 4)
assert not [name for name in {BLOCKED} if name in sys.modules]
"""


def test_import_and_merge_in_memory_need_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_merge_function_is_not_hidden_by_its_module() -> None:
    code = "import isomerge, isomerge.merge; from isomerge.merge import open_job; assert callable(isomerge.merge)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
