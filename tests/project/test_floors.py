"""The package is a tower: a file imports from its own floor and from those below it, and no imports run in a circle.

Imports inside functions and under TYPE_CHECKING count too: who reads a file has to read what it names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from repository import ROOT

PACKAGE = "contrastive_ext"
FLOORS = {
    # used by all
    "_version": 1,
    "checks": 1,
    "numerics": 1,
    # what a backend is asked, as plain data; the device code, which knows nothing of it
    "problem": 2,
    "triton_kernels": 2,
    # who computes
    "backends": 3,
    # streaming, with autograd
    "operators": 4,
    # how a batch becomes problems
    "batch": 5,
    # the losses; what can be asked about a call without making it
    "losses": 6,
    "diagnostics": 6,
    # what a training script imports
    "adapters": 7,
    "evaluation": 7,
    "modules": 7,
    "theory": 7,
    "training": 7,
    # the public names, the command line
    "__init__": 8,
    "__main__": 8,
}
LOOSE = {"__init__", "__main__", "_version", "checks", "modules", "numerics"}  # files that need no folder


class Import(NamedTuple):
    """A file of the package names another one; modules are spelled without the package, its own file as __init__."""

    path: Path
    line: int
    statement: str
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.statement}"


def files() -> dict[str, Path]:
    """Every module of the package; triton_kernels/ is mapped into it by setup.py."""
    found = {}
    for folder in (ROOT / PACKAGE, ROOT / "triton_kernels"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == PACKAGE else parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def named_by(statement: ast.AST, folder: list[str]) -> list[list[str]]:
    """What an import statement of a file in `folder` names of the package, part by part."""
    if isinstance(statement, ast.Import):
        absolute = [alias.name.split(".") for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom):
        module = statement.module.split(".") if statement.module else []
        if statement.level:
            module = [PACKAGE, *folder[: len(folder) + 1 - statement.level], *module]
        absolute = [[*module, alias.name] for alias in statement.names]
    else:
        return []
    return [parts[1:] for parts in absolute if parts[0] == PACKAGE]


def imports_of(module: str, path: Path, source: str, known: dict[str, Path]) -> Iterator[Import]:
    parts = [] if module == "__init__" else module.split(".")
    folder = parts if path.name == "__init__.py" else parts[:-1]
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        targets = {}  # in order, each once
        for named in named_by(node, folder):
            while named and ".".join(named) not in known:  # a name in a module, or a module
                named = named[:-1]
            targets[".".join(named) or "__init__"] = None
        statement = lines[node.lineno - 1].partition("(")[0].strip() if targets else ""
        for target in targets:
            yield Import(path, node.lineno, statement, module, target)


@cache
def imports() -> list[Import]:
    known = files()
    return [x for module, path in known.items() for x in imports_of(module, path, path.read_text("utf-8"), known)]


def floor(module: str) -> int:
    return FLOORS[module.partition(".")[0]]


def test_no_file_imports_from_a_floor_above():
    upwards = [
        f"{x}   (floor {floor(x.source)} names {x.target}, floor {floor(x.target)})"
        for x in imports()
        if floor(x.target) > floor(x.source)
    ]
    assert not upwards, "upwards:\n" + "\n".join(upwards)


def test_no_imports_run_in_a_circle():
    everything = imports()
    reached = {module: {x.target for x in everything if x.source == module} for module in files()}
    for via in reached:  # Warshall: what is reached through one more module
        for targets in reached.values():
            if via in targets:
                targets |= reached[via]
    circular = [str(x) for x in everything if x.source in reached[x.target]]
    assert not circular, "parts of a circle:\n" + "\n".join(circular)


def test_every_file_has_a_room_and_every_room_a_floor():
    tops = {module.partition(".")[0] for module in files()}
    assert not tops - set(FLOORS), "a folder of the package without a floor in FLOORS"
    loose = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert loose == LOOSE, "files of the package stand in a folder"


def test_every_spelling_of_an_import_is_read():
    source = """
import contrastive_ext.batch.queue, torch
from contrastive_ext import row_stats
from .. import numerics
from ..problem.pairs import (Pairs, Gate)
from . import pair_loss as base
if TYPE_CHECKING:
    from .stats import LossStats
def late():
    from ..backends import dispatch
"""
    found = imports_of("losses.infonce", ROOT / PACKAGE / "losses" / "infonce.py", source, files())
    targets = ["batch.queue", "__init__", "numerics", "problem.pairs", "losses.pair_loss"]
    assert sorted(x.target for x in found) == sorted([*targets, "losses.stats", "backends.dispatch"])
