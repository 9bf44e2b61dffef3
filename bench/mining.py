"""The most similar columns of every query: `top_columns` beside a product of a block of queries and torch.topk.

    python -m bench mining             100,000 x 100,000 x 128 on two cores: some minutes; --quick: small sizes

One line per method: seconds, seconds of all cores together, which a busy machine does not stretch, and the growth of
the process's peak. Methods take turns, in a process each; before anything is reported their columns have to agree.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_ext as ce

from .memory import RETURN_BLOCKS, resident_kib

BEST = 10  # columns of a query
SCORES = 2**24  # of a block of queries: 64 MiB
TINY = 64
AGREEMENT = (
    1e-3  # of queries may have other columns: neighbours on the list are 1e-3 apart, float32 scores exact to 1e-7
)


@dataclass(frozen=True)
class Row:
    """One method on queries as many as columns."""

    method: str
    columns: int
    features: int
    seconds: float
    core_seconds: float
    mib: float


@dataclass(frozen=True)
class Size:
    """Queries, as many as columns, their features, how often every method takes its turn, and who is left out."""

    columns: int
    features: int
    rounds: int
    without: tuple[str, ...] = ()


FULL = (Size(20_000, 128, 3), Size(100_000, 128, 1, without=("torch",)))
QUICK = (Size(2_000, 32, 1),)


def chunked(queries: Tensor, columns: Tensor) -> Tensor:
    """[N, BEST] by blocks of queries against all columns."""
    rows = max(1, SCORES // len(columns))
    return torch.cat([(block @ columns.T).topk(BEST, dim=1).indices for block in queries.split(rows)])


def ours(queries: Tensor, columns: Tensor, backend: str) -> Tensor:
    """The same by `top_columns`."""
    return ce.top_columns(queries, columns, BEST, normalize=False, backend=backend).columns


METHODS: dict[str, tuple[Callable[..., Tensor], tuple]] = {
    **{name: (ours, (name,)) for name in ("cpu", "torch")},
    "matmul + topk": (chunked, ()),
}


def measure(sizes: tuple[Size, ...], say: Callable[[str], None]) -> list[Row]:
    """All methods that run here at all sizes; RuntimeError where they disagree."""
    able = [name for name in METHODS if METHODS[name][0] is chunked or name in ce.available_backends()]
    rows = []
    for size in sizes:
        names = [name for name in able if name not in size.without]
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        columns = {}
        for _ in range(size.rounds):
            for name in names:
                *numbers, columns[name] = _alone(name, size)
                found[name].append(tuple(numbers))
        for name in names:
            _check_agreement(name, columns[name], columns[names[-1]], names[-1])
            seconds, of_cores, mib = (min(x) for x in zip(*found[name], strict=True))
            rows.append(Row(name, size.columns, size.features, seconds, of_cores, mib))
            say(line(rows[-1]))
    return rows


def line(row: Row) -> str:
    """A row for people."""
    size = f"{row.columns:,} x {row.columns:,} x {row.features}"
    return f"{row.method:14} {size:24} {row.seconds:8.2f} s {row.core_seconds:8.2f} core s {row.mib:7.1f} MiB"


def _check_agreement(name: str, columns: Tensor, others: Tensor, other: str) -> None:
    different = (columns != others).any(1).double().mean().item()
    if different > AGREEMENT:
        raise RuntimeError(f"{name} finds other columns than {other} for {different:.2%} of the queries.")


def _alone(name: str, size: Size) -> tuple[float, float, float, Tensor]:
    os.environ |= RETURN_BLOCKS
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (name, size, torch.get_num_threads()))


def _measured(name: str, size: Size, threads: int) -> tuple[float, float, float, Tensor]:
    """Seconds, seconds of all cores, MiB, columns, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    queries, columns = (normalize(torch.randn(size.columns, size.features), dim=1) for _ in "qc")
    function, more = METHODS[name]
    function(queries[:TINY], columns[:TINY], *more)
    with contextlib.suppress(OSError):  # where the peak cannot be reset it can only be overstated
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    began, of_cores = time.perf_counter(), time.process_time()
    found = function(queries, columns, *more)
    seconds, of_cores = time.perf_counter() - began, time.process_time() - of_cores
    return seconds, of_cores, (resident_kib("VmHWM") - before) / 1024, found
