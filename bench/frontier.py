"""The out-of-memory frontier: the largest N each method can run in the memory of this machine, from measured peaks.

A method that keeps the matrix grows as bytes/N^2, measured at its largest N; the others as bytes/N, which overstates
their need because their constant workspace is scaled too. Nothing is run at the frontier itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .results import Row

LINEAR_BASELINES = ("chunked",)


@dataclass(frozen=True)
class Limit:
    """The frontier of one method: N, and hours one forward + backward would take there (time grows as N^2)."""

    backend: str
    is_ours: bool
    largest_n: int
    hours: float | None


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
    """Limits of every method of the growing series whose peak was measured, smallest first."""
    limits = []
    for backend, series in growing_series(rows).items():
        measured = [row for row in series if row.peak_extra_mib]
        if not measured:
            continue
        last = measured[-1]
        is_linear = last.is_ours or backend in LINEAR_BASELINES
        growth = memory_bytes / (last.peak_extra_mib * 2**20)
        largest = int(last.N * (growth if is_linear else math.sqrt(growth)))
        timed = [row for row in series if row.total_quartiles_ms]
        hours = timed[-1].total_quartiles_ms[1] / 3.6e6 * (largest / timed[-1].N) ** 2 if timed else None
        limits.append(Limit(backend, last.is_ours, largest, hours))
    return sorted(limits, key=lambda limit: limit.largest_n)


def rounded(n: int) -> str:
    """Two digits of an extrapolated size: "38k", "2.7M"."""
    return f"{n / 1e6:.2g}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def duration(hours: float) -> str:
    """ "40 s", "3 min", "7 h", "12 days"."""
    seconds = 3600 * hours
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
