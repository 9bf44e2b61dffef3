"""The CUDA forward on the machine: compiled by nvcc, launched as csrc/cuda/row_stats_forward.cu does."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import struct
import subprocess
from functools import lru_cache
from typing import NamedTuple

import cuda_gate
import numpy as np

from . import floats
from .bulk import TensorMap
from .machine import program
from .memory import GlobalMemory
from .report import Report
from .schedules import Schedule

FEATURES, TILE, BOX = 128, 128, 64
THREADS = 288
UNFILLED = np.iinfo(np.int64).min  # an id of padding
PARTS = 3  # of a partial result: shift, sum, count


@lru_cache
def ptx_of(name: str) -> str:
    """csrc/cuda/<name>.cu for sm_90a with its source lines; kept in build/ptx for the next process."""
    nvcc = cuda_gate.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA_HOME, PATH).")
    sources = sorted(p for p in cuda_gate.FOLDER.parent.rglob("*") if p.suffix in (".h", ".cuh", ".cu"))
    state = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + nvcc.encode()).hexdigest()[:16]
    kept = cuda_gate.ROOT / "build" / "ptx" / f"{name}-{state}.ptx"
    if not kept.is_file():
        flags = ["-std=c++17", "-O3", "-lineinfo", "-ptx", "-gencode=arch=compute_90a,code=compute_90a"]
        source = cuda_gate.FOLDER / f"{name}.cu"
        done = subprocess.run([nvcc, *flags, str(source), "-o", "-"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_text(done.stdout)
        made.replace(kept)  # several processes may have compiled it
    return kept.read_text()


def forward_ptx() -> str:
    """The forward."""
    return ptx_of("row_stats_forward")


def shared_bytes(features: int, columns: int, vectors: int, sums: int = 0) -> int:
    """Of a block: csrc/cuda/shape.h once more."""
    tile = columns * features * 2
    stages = 4 if 4 * tile <= 128 << 10 else 2
    numbers = stages * max(1, vectors) * columns * 4
    barriers = -(-(1 + 2 * stages) * 8 // 16) * 16
    of_warps = 2 * sums * 8 * columns * 4
    return of_warps + TILE * features * 2 + stages * tile + numbers + barriers + 1024  # room to align the first tile


def matrix_map(address: int, rows: int, features: int, box_rows: int) -> TensorMap:
    """What TMA is told of 16-bit rows: csrc/cuda/tensor_map.h once more."""
    return TensorMap(address, 2, (features, rows), (features * 2,), (BOX, box_rows), 128)


class Forward(NamedTuple):
    """A call of row_stats_forward; u and v are bits of 16-bit numbers [rows, features], v None for one set."""

    u: np.ndarray
    v: np.ndarray | None = None
    bfloat16: bool = False
    num_images: int = 0
    positive_offset: int = 0
    row_ids: np.ndarray | None = None
    col_ids: np.ndarray | None = None
    beta: float = 1.0
    scale: float = 1.0
    scale_on_device: bool = False
    unit: bool = True
    splits: int = 1  # of a window
    columns: bool = False  # their statistics too
    windows: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.u if self.v is None else self.v)

    def spans(self) -> list[tuple[int, int]]:
        """The column tiles of each window."""
        tiles = -(-self.shape[1] // TILE)
        bounds = [tiles * k // self.windows for k in range(self.windows + 1)]
        return list(itertools.pairwise(bounds))

    def sweep(self, schedule: Schedule, ptx: str = "", shared_base: int = 1024) -> Result:
        """Partial results of every split, of columns those of every window; whatever is not written stays NaN."""
        n, m = self.shape
        memory, nan = GlobalMemory(), np.float32(np.nan)
        splits, row_tiles = self.windows * self.splits, -(-n // TILE)
        at = {
            "u": memory.place(self.u, "u"),
            "partials": memory.place(np.full((splits, PARTS, n), nan), "partials"),
        }
        places = []
        at["v"] = at["u"] if self.v is None else memory.place(self.v, "v")
        for name in ("row_ids", "col_ids"):
            ids = getattr(self, name)
            at[name] = 0 if ids is None else memory.place(ids.astype(np.int64), name)
        if self.v is None:
            at["col_ids"] = at["row_ids"]
        at["scale"] = memory.place(np.array(self.scale, np.float32), "scale") if self.scale_on_device else 0
        features = self.u.shape[1]
        maps = [matrix_map(at["u"], n, features, TILE), matrix_map(at["v"], m, features, TILE)]
        entry = entry_of(features, self.bfloat16, self.columns)
        program_of_sweep = program(ptx or only_entry(forward_ptx(), entry), entry)
        for window, (begin, end) in enumerate(self.spans()):
            width = min(m, end * TILE) - begin * TILE
            of_columns = 0
            if self.columns:
                of_columns = memory.place(np.full((row_tiles, PARTS, width), nan), f"columns of window {window}")
                places.append(of_columns)
            arguments = struct.pack(
                "<qqqqQQqqffQ?7xQQii", n, self.num_images, self.positive_offset, 0, at["row_ids"], at["col_ids"], n, m,
                self.beta, -1.0 if self.scale_on_device else self.scale, at["scale"], self.unit,
                at["partials"] + window * self.splits * PARTS * n * 4, of_columns, begin, end,
            )  # fmt: skip
            report = program_of_sweep.launch(
                (row_tiles, self.splits), THREADS, [arguments, *maps], memory,
                shared=shared_bytes(features, TILE, 0, PARTS if self.columns else 0), schedule=schedule,
                shared_base=shared_base, counts_banks=True,
            )  # fmt: skip
        return Result(memory, at["partials"], report, places)

    def run(self, schedule: Schedule, shared_base: int = 1024) -> tuple[list[np.ndarray], Result]:
        """([lse, count] and, where asked, of columns, partial results): the sweep, then the merges."""
        swept, (n, m) = self.sweep(schedule, shared_base=shared_base), self.shape
        memory, program_of_merge = swept.memory, program(only_entry(forward_ptx(), "merge_kernel"))
        names = {"lse": n, "count": n} | ({"col_lse": m, "col_count": m} if self.columns else {})
        at = {name: memory.place(np.full(size, np.float32(np.nan)), name) for name, size in names.items()}

        def merge(partials, anchors, splits, lse, count):
            arguments = [partials, anchors, splits, lse, count]
            program_of_merge.launch((-(-anchors // 128),), 128, arguments, memory, schedule=schedule)

        merge(swept.partials, n, self.windows * self.splits, at["lse"], at["count"])
        for (begin, end), partials in zip(self.spans(), swept.column_partials, strict=False):
            width, first = min(m, end * TILE) - begin * TILE, 4 * begin * TILE
            merge(partials, width, -(-n // TILE), at["col_lse"] + first, at["col_count"] + first)
        return [memory.array(name) for name in names], swept

    # ---- what is right

    def negatives(self, reverse: bool = False) -> np.ndarray:
        """[n, m], whether column j is a negative of row i, or row i one of column j: csrc/pairs.h once more."""
        n, m = self.shape
        keep = np.ones((n, m), bool)
        i, shown = np.arange(n)[:, None], np.arange(m)[None] - self.positive_offset
        if self.num_images:
            keep &= ~((shown >= 0) & (shown < n) & ((shown - i) % self.num_images == 0))
        columns = self.row_ids if self.v is None else self.col_ids
        if self.row_ids is not None and columns is not None:
            keep &= self.row_ids[:, None] != columns[None]
        if reverse and self.row_ids is not None:
            keep &= self.row_ids[:, None] != UNFILLED
        if not reverse and columns is not None:
            keep &= columns[None] != UNFILLED
        return keep

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """u and v in float64."""
        as_float = (lambda x: floats.from_bf16(x)) if self.bfloat16 else (lambda x: x)
        u = as_float(self.u).astype(np.float64)
        return u, u if self.v is None else as_float(self.v).astype(np.float64)

    def logits(self, reverse: bool = False) -> np.ndarray:
        """[n, m] in float64, -inf where a pair does not count."""
        u, v = self.operands()
        return np.where(self.negatives(reverse), (u @ v.T) * self.beta * self.scale, -np.inf)

    def truth(self, reverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(lse, count) of rows, or in reverse of columns"""
        axis = 0 if reverse else 1
        logits = self.logits(reverse)
        largest = logits.max(axis, keepdims=True)
        largest = np.where(np.isinf(largest), 0, largest)
        with np.errstate(divide="ignore"):
            lse = largest + np.log(np.exp(logits - largest).sum(axis, keepdims=True))
        return lse.ravel(), self.negatives(reverse).sum(axis)

    def is_exact(self, swept: Result) -> bool:
        """Every bit: with whole scores, a static shift and scale ln 2 the sums are of powers of two."""
        exact = self._is_exact(swept.memory.array("partials"), slice(None))
        for window, (begin, end) in enumerate(self.spans() if self.columns else []):
            partials = swept.memory.array(f"columns of window {window}")
            exact &= self._is_exact(partials, slice(begin * TILE, end * TILE), reverse=True)
        return exact

    def _is_exact(self, partials: np.ndarray, anchors: slice, reverse: bool = False) -> bool:
        axis, partials = 0 if reverse else 1, partials.astype(np.float64)
        sums = np.exp2(np.rint(self.logits(reverse) / (self.beta * self.scale))).sum(axis)[anchors]
        counts = self.negatives(reverse).sum(axis)[anchors]
        right = (partials[:, 1].sum(0) == sums) & (partials[:, 2].sum(0) == counts)
        return bool(right.all() and (partials[:, 0] == 0).all())


class Result(NamedTuple):
    """What a sweep left behind."""

    memory: GlobalMemory
    partials: int  # their address
    report: Report  # of the last window
    column_partials: list[int]  # their addresses, window by window


def entry_of(features: int, bfloat16: bool, columns: bool = False) -> str:
    """What the mangled name of a kernel matches."""
    return f"OperandE{int(bfloat16)}ELi{features}ELb{int(columns)}E"


@lru_cache
def only_entry(ptx: str, pattern: str) -> str:
    """The text with one of its kernels: edits meet no other, and it is read faster."""
    head, *entries = re.split(r"(?=^(?:\.visible )?\.entry )", ptx, flags=re.MULTILINE)
    (entry,) = (e for e in entries if re.search(pattern, e[: e.index("(")]))
    files = "".join(re.findall(r"^\s*\.file[^\n]*\n", ptx, flags=re.MULTILINE))
    return head + entry + ("" if files in head + entry else files)
