"""The results file: facts about the machine, the main job, one row per case and method. Written after every case."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .case import Case

# What `status` of a row may be; only "ok" has times.
OK = "ok"
RED = "red gate"
OUT_OF_MEMORY = "out of memory"
TOO_SLOW = "too slow to repeat"


def write_json(content: dict[str, Any], path: Path) -> None:
    """Replace `path` in one step: a killed run leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


@dataclass(frozen=True)
class Row:
    """One case computed by one method.

    status          "ok", or why there are no times
    forward_ms, backward_ms  medians; *_quartiles_ms are [lower quartile, median, upper quartile]
    peak_extra_mib  peak memory of forward + backward beyond the inputs, gradients included
    *_gemm_share    executed flops (flops.FLOPS) per second over the library's GEMM rate, gemm_tflops, measured beside
    gate            largest error over its tolerance; above 1 is red
    ratios          baseline time / this time, quartiles over rounds; above 1 this method is faster
    graph_ms        forward + backward replayed as a CUDA graph (small N)
    exp_floor_ms    [forward, backward] of the exponentials alone on a GPU, memory_floor_ms of reading and writing rows
                    once, both floors.py
    """

    loss: str
    backend: str
    is_ours: bool
    layout: str
    N: int
    M: int
    D: int
    dtype: str
    temperature: float
    status: str = OK
    gate: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_quartiles_ms: list[float] | None = None
    backward_quartiles_ms: list[float] | None = None
    total_quartiles_ms: list[float] | None = None
    graph_ms: float | None = None
    rounds: int = 0
    peak_extra_mib: float | None = None
    gemm_tflops: float | None = None
    forward_gemm_share: float | None = None
    backward_gemm_share: float | None = None
    ratios: dict[str, list[float]] = field(default_factory=dict)
    exp_floor_ms: list[float] | None = None
    memory_floor_ms: float | None = None

    @property
    def case_name(self) -> str:
        """The name of its case."""
        return Case(self.loss, self.layout, self.N, self.M, self.D, self.dtype, self.temperature).name


@dataclass
class Results:
    """Everything one run found out."""

    environment: dict[str, Any]
    gemm_tflops: dict[str, float] = field(default_factory=dict)  # dtype -> best rate seen in the run
    digits: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases not measured: the time limit, or stopped before
    seconds: float = 0.0

    @property
    def is_green(self) -> bool:
        """Whether nothing of ours computed anything wrong."""
        return all(job["agrees"] for job in self.digits) and not any(
            row.is_ours and row.status == RED for row in self.rows
        )

    def add(self, rows: list[Row]) -> None:
        """The rows of one more case."""
        self.rows += rows
        for row in rows:
            if row.gemm_tflops:
                self.gemm_tflops[row.dtype] = max(self.gemm_tflops.get(row.dtype, 0.0), row.gemm_tflops)

    def cases(self) -> list[list[Row]]:
        """The rows, case by case."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row.case_name)]

    def write(self, path: Path) -> None:
        """Facts first; see `write_json`."""
        write_json(self.environment | {k: value for k, value in asdict(self).items() if k != "environment"}, path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results `write` wrote; ValueError if the file holds something else."""
        try:
            content = json.loads(path.read_text())
            own = {f.name: content.pop(f.name) for f in fields(cls) if f.name != "environment"}
            own["rows"] = [Row(**row) for row in own["rows"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no results file of this benchmark: {error!r}") from error
        return cls(environment=content, **own)
