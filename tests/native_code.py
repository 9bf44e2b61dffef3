"""Headers of csrc/ from Python: modules compiled around them at test time, and the pair rules that they must follow."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from repository import ROOT

CXX = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")


def compile_module(folder: Path, name: str, sources: list[Path]) -> ModuleType:
    """Build a pybind11 module of C++ files that include headers of csrc/, and import it."""
    pybind11 = pytest.importorskip("pybind11")
    if not CXX:
        pytest.skip("no C++ compiler was found")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen([*shlex.split(CXX), *flags, "-c", str(s), "-o", str(o)])
        for s, o in zip(sources, objects, strict=True)
    ]
    assert all([job.wait() == 0 for job in jobs])  # a list: every compiler is waited for
    subprocess.run([*shlex.split(CXX), "-shared", "-pthread", *map(str, objects), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAIR_CASES = [  # rows, columns, images, offset: what it stands for
    (8, 8, 4, 0),  # two views
    (9, 9, 3, 0),  # three views
    (6, 6, 6, 0),  # CLIP
    (5, 13, 5, 4),  # a rank's shard, columns before and after
    (5, 7, 0, 0),  # a queue
    (7, 7, 1, 0),  # one image: nothing is a negative
    (5, 9, 3, 2),  # images do not divide the rows
    (1, 1, 1, 0),
    (12, 130, 12, 40),  # several vectors
]


def same_image(n: int, m: int, images: int, offset: int) -> np.ndarray:
    i, shown = np.arange(n)[:, None], np.arange(m)[None] - offset
    return (images > 0) & (shown >= 0) & (shown < n) & ((shown - i) % max(1, images) == 0)


@dataclass
class PairProblem:
    """Inputs of the pair rules; `expected` states the rules pair by pair, `check` asks the kernels."""

    n: int
    m: int
    images: int = 0
    offset: int = 0
    one_set: bool = False
    only_equal_ids: bool = False
    row_ids: np.ndarray | None = None
    col_ids: np.ndarray | None = None
    ignored: np.ndarray | None = None
    scores: np.ndarray | None = None
    row_limit: Sequence[float] = ()
    col_limit: Sequence[float] = ()

    def expected(self, unfilled: int) -> tuple[np.ndarray, np.ndarray]:
        forward = ~same_image(self.n, self.m, self.images, self.offset)
        backward = forward.copy()
        for i, j in np.ndindex(self.n, self.m):
            row_id = None if self.row_ids is None else self.row_ids[i]
            col_id = None if self.col_ids is None else self.col_ids[j]
            equal = row_id is not None and row_id == col_id
            has_ids = self.row_ids is not None or self.col_ids is not None
            counts = not has_ids or equal == self.only_equal_ids
            forward[i, j] &= counts and col_id != unfilled
            backward[i, j] &= counts and row_id != unfilled
            if self.ignored is not None:
                forward[i, j] &= j not in self.ignored[i % len(self.ignored)]
                backward[i, j] &= not self.one_set or i not in self.ignored[j % len(self.ignored)]
            if self.scores is not None:
                forward[i, j] &= not self.scores[i, j] > self.row_limit[i]
                backward[i, j] &= not (len(self.col_limit) and self.scores[i, j] > self.col_limit[j])
        return forward, backward

    def check(self, native: ModuleType, isa: str, kind: str) -> None:
        forward, backward = self.expected(native.UNFILLED)
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]
        for tile in [(4, 64), (8, 16), (3, 5), (self.n, self.m)]:
            classes, per_row, per_col = getattr(native, f"classify_{kind}")(isa, *fields, *tile)
            np.testing.assert_array_equal(classes & native.COLUMN_IS_NEGATIVE > 0, forward)
            np.testing.assert_array_equal(classes & native.ROW_IS_NEGATIVE > 0, backward)
            np.testing.assert_array_equal(per_row, forward.sum(1))
            np.testing.assert_array_equal(per_col, backward.sum(0))
