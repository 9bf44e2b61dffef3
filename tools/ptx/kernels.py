"""This project's CUDA kernels on the machine: compiled by nvcc, launched as csrc/cuda/row_stats_forward.cu does."""

from __future__ import annotations

import struct
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .bulk import TensorMap
from .machine import program
from .memory import GlobalMemory
from .report import Report
from .schedules import Schedule

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import cuda_gate  # noqa: E402

FEATURES, TILE, BOX = 128, 128, 64
THREADS = 288
TILE_BYTES = TILE * FEATURES * 2
STAGES = 4
SHARED_BYTES = (1 + STAGES) * TILE_BYTES + (1 + 2 * STAGES) * 8 + 1024  # tiles, mbarriers, room to align the first tile
PARTS = 3  # of a partial result: shift, sum, count


@lru_cache
def forward_ptx() -> str:
    """The forward for sm_90a; source lines are kept."""
    nvcc = cuda_gate.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA_HOME, PATH).")
    flags = ["-std=c++17", "-O3", "-lineinfo", "-ptx", "-gencode=arch=compute_90a,code=compute_90a"]
    done = subprocess.run([nvcc, *flags, str(cuda_gate.SOURCE), "-o", "-"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


class Forward(NamedTuple):
    """A call of row_stats_forward; u and v are bits of 16-bit numbers [rows, 128], v None for one set."""

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

    def run(self, schedule: Schedule, ptx: str = "", shared_base: int = 1024) -> tuple[np.ndarray, np.ndarray, Report]:
        """(lse, count, what the sweep did), with every output NaN before the launch."""
        ptx = ptx or forward_ptx()
        n, m = len(self.u), len(self.u if self.v is None else self.v)
        memory = GlobalMemory()
        nan = np.float32(np.nan)
        at = {"u": memory.place(self.u, "u"), "partials": memory.place(np.full((self.splits, PARTS, n), nan), "partials")}
        at["v"] = at["u"] if self.v is None else memory.place(self.v, "v")
        for name in ("row_ids", "col_ids"):
            ids = getattr(self, name)
            at[name] = 0 if ids is None else memory.place(ids.astype(np.int64), name)
        if self.v is None:
            at["col_ids"] = at["row_ids"]
        at["scale"] = memory.place(np.array(self.scale, np.float32), "scale") if self.scale_on_device else 0
        outputs = {name: memory.place(np.full(n, nan), name) for name in ("lse", "count")}
        maps = [
            TensorMap(at[name], 2, (FEATURES, rows), (FEATURES * 2,), (BOX, TILE), 128)
            for name, rows in (("u", n), ("v", m))
        ]
        arguments = struct.pack(
            "<qqqQQqqffQ?7xQ", n, self.num_images, self.positive_offset, at["row_ids"], at["col_ids"], n, m, self.beta,
            -1.0 if self.scale_on_device else self.scale, at["scale"], self.unit, at["partials"],
        )  # fmt: skip
        sweep = program(ptx, f"row_stats_forward_kernel.*OperandE{int(self.bfloat16)}EEE")
        report = sweep.launch(
            (-(-n // TILE), self.splits), THREADS, [arguments, *maps], memory, shared=SHARED_BYTES, schedule=schedule,
            shared_base=shared_base, counts_banks=True,
        )  # fmt: skip
        merge = program(ptx, "merge_kernel")
        merge.launch(
            (-(-n // 128),), 128, [at["partials"], n, self.splits, outputs["lse"], outputs["count"]], memory,
            schedule=schedule,
        )  # fmt: skip
        return memory.array("lse"), memory.array("count"), report
