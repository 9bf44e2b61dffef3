"""The files of bench/ stand in the order that its `__init__` gives, and import nothing from above themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bench

FOLDER = Path(bench.__file__).parent
FLOORS = re.findall(r"\b(\w+)\.py\b", bench.__doc__)
ENTRIES = {"__init__", "test_speed"}  # the package itself, and pytest's way into it


def imported(path: Path) -> set[str]:
    """Names of the files of bench/ that a file of it imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {name.name for name in node.names}
    return found


def test_every_file_has_its_floor():
    assert sorted(FLOORS) == sorted({path.stem for path in FOLDER.glob("*.py")} - ENTRIES)


def test_no_file_imports_from_its_own_height_or_above():
    upwards = [
        f"{name}.py imports {other}.py"
        for height, name in enumerate(FLOORS)
        for other in imported(FOLDER / f"{name}.py") - set(FLOORS[:height])
    ]
    assert not upwards
