"""Arrows between the package's rooms point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ("privacy",),
    ("data", "nn", "strategies"),
    ("generators",),
    ("evaluation", "release"),
    ("callbacks",),
]
LEAVES = {"_validate", "_compat"}


def rooms() -> list[tuple[str, Path]]:
    found = [(path.parent.name, path) for path in (ROOT / "lightning_dpgen").glob("*/*.py")]
    return found + [("callbacks", path) for path in (ROOT / "callbacks").glob("*.py")]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: getattr(value, "stem", value))
def test_imports_point_down(room, path):
    level = next(i for i, layer in enumerate(LAYERS) if room in layer)
    allowed = {name for layer in LAYERS[:level] for name in layer} | {room} | LEAVES
    allowed |= set(LAYERS[level]) if room in ("release", "evaluation") else set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lightning_dpgen":
            assert len(parts) > 1, f"{path} imports the whole package"
            assert parts[1] in allowed, f"{path} imports {name}"


def test_privacy_knows_no_lightning():
    for path in (ROOT / "lightning_dpgen" / "privacy").glob("*.py"):
        for name in imports(path):
            assert not name.startswith(("lightning.", "pytorch_lightning", "lightning_dpgen._compat")), path
