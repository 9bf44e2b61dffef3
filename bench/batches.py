"""Large batches: what a gradient cache and a ring of processes cost, and what memory they save.

    python -m bench batches            two minutes on two cores; --quick: small sizes

    gradient cache   InfoNCE of an encoder's embeddings, all at once and in chunks, on one process
    ring             InfoNCE of a fixed number of embeddings per rank, gathered and in a ring, on 1, 2 and 4 processes

One line per method: milliseconds of forward and backward, the least of some rounds that take turns, and the growth of a
process's peak, the largest over ranks. Before anything is timed the methods' losses have to agree. Processes share this
machine's cores and its memory bus (gloo): times compare the two methods of a line with each other, nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import contrastive_ext as ce

from .memory import RETURN_BLOCKS, resident_kib

ROUNDS = 3
TEMPERATURE = 0.1
AGREEMENT = 1e-5  # relative, of float32 losses whose sums have another order


@dataclass(frozen=True)
class Row:
    """One method of one comparison."""

    name: str
    method: str
    ranks: int
    milliseconds: float
    mib: float
    loss: float


@dataclass(frozen=True)
class Sizes:
    """Pairs and features of the encoder's batch, its hidden width, its chunk; pairs and features of a rank; numbers of
    ranks.
    """

    pairs: int
    features: int
    hidden: int
    chunk: int
    of_rank: int
    of_rank_features: int
    ranks: tuple[int, ...]


FULL = Sizes(pairs=2048, features=128, hidden=2048, chunk=128, of_rank=512, of_rank_features=1024, ranks=(1, 2, 4))
QUICK = Sizes(pairs=256, features=32, hidden=512, chunk=64, of_rank=64, of_rank_features=64, ranks=(1, 2))


def measure(sizes: Sizes, say: Callable[[str], None]) -> list[Row]:
    """All comparisons; RuntimeError where methods of one disagree."""
    rows = _compared("gradient cache", _cache_methods, sizes, 1)
    for row in rows:
        say(line(row))
    for ranks in sizes.ranks:
        found = _compared("ring", _ring_methods, sizes, ranks)
        for row in found:
            say(line(row))
        rows += found
    return rows


def line(row: Row) -> str:
    """A row for people."""
    ranks = f"{row.ranks} rank{'s' if row.ranks > 1 else ''}"
    return f"{row.name:16} {row.method:8} {ranks:8} {row.milliseconds:9,.0f} ms {row.mib:8,.1f} MiB"


def _cache_methods(sizes: Sizes, rank: int) -> dict[str, Callable[[], float]]:
    encoder = nn.Sequential(
        nn.Linear(sizes.features, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.hidden), nn.GELU(),
        nn.Linear(sizes.hidden, sizes.features),
    )  # fmt: skip
    x1, x2 = torch.randn(2, sizes.pairs, sizes.features)
    cache = ce.GradientCache(ce.fused_infonce_loss, sizes.chunk)

    def step(loss: Callable[[], torch.Tensor]) -> float:
        encoder.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    return {
        "plain": lambda: step(lambda: ce.fused_infonce_loss(encoder(x1), encoder(x2), TEMPERATURE)),
        "cached": lambda: step(lambda: cache(encoder, x1, x2, temperature=TEMPERATURE)),
    }


def _ring_methods(sizes: Sizes, rank: int) -> dict[str, Callable[[], float]]:
    torch.manual_seed(rank)
    z = [torch.randn(sizes.of_rank, sizes.of_rank_features).requires_grad_() for _ in range(2)]

    def step(group: ce.AllRanks) -> float:
        dist.barrier()
        value = ce.fused_infonce_loss(*z, TEMPERATURE, group=group)
        torch.autograd.grad(value, z)
        return value.item()

    return {
        "gather": lambda: step(ce.AllRanks()),
        "ring": lambda: step(ce.AllRanks(exchange="ring")),
    }


def _compared(name: str, methods: Callable, sizes: Sizes, ranks: int) -> list[Row]:
    """The methods on so many processes of their own."""
    threads = max(1, torch.get_num_threads() // ranks)
    os.environ |= RETURN_BLOCKS
    with tempfile.TemporaryDirectory() as folder:
        calls = [(methods, sizes, rank, ranks, threads, f"{folder}/meet") for rank in range(ranks)]
        with multiprocessing.get_context("spawn").Pool(ranks) as pool:
            by_rank = pool.starmap(_measured, calls, chunksize=1)
    rows = []
    for method in by_rank[0]:
        milliseconds, mib, losses = zip(*(found[method] for found in by_rank), strict=True)
        rows.append(Row(name, method, ranks, max(milliseconds), max(mib), sum(losses) / ranks))
    expected = rows[0].loss
    for row in rows:
        if not abs(row.loss - expected) <= AGREEMENT * abs(expected):
            raise RuntimeError(f"{name}, {row.method} on {ranks} ranks: loss {row.loss}, {rows[0].method} {expected}.")
    return rows


def _measured(
    methods: Callable, sizes: Sizes, rank: int, ranks: int, threads: int, meet: str
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds, MiB and loss of every method, in this process."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    steps = methods(sizes, rank)
    losses = {name: step() for name, step in steps.items()}  # the first call of each touches what later ones have
    mib = {}
    for name, step in steps.items():
        with contextlib.suppress(OSError):  # where the peak cannot be reset it can only be overstated
            Path("/proc/self/clear_refs").write_text("5")
        before = resident_kib("VmRSS")
        step()
        mib[name] = (resident_kib("VmHWM") - before) / 1024
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    dist.destroy_process_group()
    return {name: (1000 * min(seconds[name]), mib[name], losses[name]) for name in steps}
