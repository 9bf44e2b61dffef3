"""How large N may become on this machine with each method: until memory is full or a step takes a minute.

From the largest N measured: time grows as N^2; so does memory where a method keeps the matrix, elsewhere as N, which
overstates the need because constant workspace is scaled too. Nothing is run at the frontier itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .results import Row

LINEAR_BASELINES = ("chunked",)
LONGEST_STEP_MS = 60e3


@dataclass(frozen=True)
class Limit:
    """The frontier of one method, and what sets it: "memory" or "a minute"."""

    backend: str
    is_ours: bool
    largest_n: int
    bound: str


def growing_series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of the two-view problem measured at most sizes, by method, N ascending."""
    problems: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.layout == "two_view":
            problems.setdefault((row.loss, row.D, row.dtype, row.temperature), []).append(row)
    if not problems:
        return {}
    longest = max(problems.values(), key=lambda found: len({row.N for row in found}))
    series: dict[str, list[Row]] = {}
    for row in sorted(longest, key=lambda row: row.N):
        series.setdefault(row.backend, []).append(row)
    return series


def frontier(rows: Iterable[Row], memory_bytes: float) -> list[Limit]:
    """Limits of every method of the growing series whose peak and time were measured, smallest first."""
    limits = []
    for backend, series in growing_series(rows).items():
        measured = [row for row in series if row.peak_extra_mib and row.total_quartiles_ms]
        if not measured:
            continue
        last = measured[-1]
        growth = memory_bytes / (last.peak_extra_mib * 2**20)
        fits = int(last.N * (growth if last.is_ours or backend in LINEAR_BASELINES else math.sqrt(growth)))
        in_time = int(last.N * math.sqrt(LONGEST_STEP_MS / last.total_quartiles_ms[1]))
        limits.append(Limit(backend, last.is_ours, min(fits, in_time), "memory" if fits <= in_time else "a minute"))
    return sorted(limits, key=lambda limit: limit.largest_n)


def rounded(n: int) -> str:
    """Two digits of an extrapolated size: "38k", "2.7M"."""
    return f"{n / 1e6:.2g}M" if n >= 1e6 else f"{n / 1e3:.0f}k"
