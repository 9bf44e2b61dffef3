"""The CUDA forward on the machine: compiled by nvcc, launched as csrc/cuda/row_stats_forward.cu does."""

from __future__ import annotations

import hashlib
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


def shared_bytes(features: int, columns: int, vectors: int) -> int:
    """Of a block: csrc/cuda/shape.h once more."""
    tile = columns * features * 2
    stages = 4 if 4 * tile <= 128 << 10 else 2
    numbers = stages * max(1, vectors) * columns * 4
    barriers = -(-(1 + 2 * stages) * 8 // 16) * 16
    return TILE * features * 2 + stages * tile + numbers + barriers + 1024  # room to align the first tile


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
    splits: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.u if self.v is None else self.v)

    def sweep(self, schedule: Schedule, ptx: str = "", shared_base: int = 1024) -> Result:
        """Partial results of every split; whatever is not written stays NaN."""
        n, m = self.shape
        memory, nan = GlobalMemory(), np.float32(np.nan)
        at = {
            "u": memory.place(self.u, "u"),
            "partials": memory.place(np.full((self.splits, PARTS, n), nan), "partials"),
        }
        at["v"] = at["u"] if self.v is None else memory.place(self.v, "v")
        for name in ("row_ids", "col_ids"):
            ids = getattr(self, name)
            at[name] = 0 if ids is None else memory.place(ids.astype(np.int64), name)
        if self.v is None:
            at["col_ids"] = at["row_ids"]
        at["scale"] = memory.place(np.array(self.scale, np.float32), "scale") if self.scale_on_device else 0
        features = self.u.shape[1]
        maps = [matrix_map(at["u"], n, features, TILE), matrix_map(at["v"], m, features, TILE)]
        arguments = struct.pack(
            "<qqqqQQqqffQ?7xQ", n, self.num_images, self.positive_offset, 0, at["row_ids"], at["col_ids"], n, m,
            self.beta, -1.0 if self.scale_on_device else self.scale, at["scale"], self.unit, at["partials"],
        )  # fmt: skip
        entry = f"row_stats_forward_kernel.*OperandE{int(self.bfloat16)}ELi{features}E"
        sweep = program(ptx or only_entry(forward_ptx(), entry), entry)
        report = sweep.launch(
            (-(-n // TILE), self.splits), THREADS, [arguments, *maps], memory,
            shared=shared_bytes(features, TILE, 0), schedule=schedule, shared_base=shared_base, counts_banks=True,
        )  # fmt: skip
        return Result(memory, at["partials"], report)

    def run(self, schedule: Schedule, shared_base: int = 1024) -> tuple[np.ndarray, np.ndarray, Result]:
        """(lse, count, partial results): the sweep, then the merge."""
        swept, n = self.sweep(schedule, shared_base=shared_base), self.shape[0]
        nan = np.full(n, np.float32(np.nan))
        outputs = [swept.memory.place(nan, name) for name in ("lse", "count")]
        merge = program(only_entry(forward_ptx(), "merge_kernel"))
        merge.launch((-(-n // 128),), 128, [swept.partials, n, self.splits, *outputs], swept.memory, schedule=schedule)
        return swept.memory.array("lse"), swept.memory.array("count"), swept

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

    def logits(self) -> np.ndarray:
        """[n, m] in float64, -inf where a pair does not count."""
        u, v = self.operands()
        return np.where(self.negatives(), (u @ v.T) * self.beta * self.scale, -np.inf)

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """(lse, count)"""
        logits = self.logits()
        largest = np.where(np.isinf(logits.max(1)), 0, logits.max(1))
        with np.errstate(divide="ignore"):
            return largest + np.log(np.exp(logits - largest[:, None]).sum(1)), self.negatives().sum(1)

    def is_exact(self, swept: Result) -> bool:
        """Every bit: with whole scores, a static shift and scale ln 2 the sums are of powers of two."""
        partials = swept.memory.array("partials").astype(np.float64)
        sums = np.exp2(np.rint(self.logits() / (self.beta * self.scale))).sum(1)
        right = (partials[:, 1].sum(0) == sums) & (partials[:, 2].sum(0) == self.negatives().sum(1))
        return bool(right.all() and (partials[:, 0] == 0).all())


class Result(NamedTuple):
    """What a sweep left behind."""

    memory: GlobalMemory
    partials: int  # their address
    report: Report


@lru_cache
def only_entry(ptx: str, pattern: str) -> str:
    """The text with one of its kernels: edits meet no other, and it is read faster."""
    head, *entries = re.split(r"(?=^(?:\.visible )?\.entry )", ptx, flags=re.MULTILINE)
    (entry,) = (e for e in entries if re.search(pattern, e[: e.index("(")]))
    files = "".join(re.findall(r"^\s*\.file[^\n]*\n", ptx, flags=re.MULTILINE))
    return head + entry + ("" if files in head + entry else files)
