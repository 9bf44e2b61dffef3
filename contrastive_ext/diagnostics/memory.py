"""How much memory a loss needs beside its inputs, before you run it.

A formula for every backend of what is alive at its peak, in InfoNCE over pairs: arrays as long as the batch, tiles, and
what is as large as the matrix where a backend keeps it. tests/test_estimates.py holds them to measurements, those of
the GPU to bench/results/nvidia-h200.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..backends import cpu, cuda, dispatch, triton
from ..backends import torch as plain_torch
from ..backends.torch import kept, row_stats
from ..backends.triton import launch
from ..batch.distributed import EXCHANGES, Exchange
from ..batch.request import LAYOUTS
from ..batch.ring import OVERLAPS
from ..checks import check_choice
from ..numerics import SUPPORTED_DTYPES, resolve_operand_dtype, stats_dtype

MIB = 2**20
# How often the columns of other ranks are held, gradients included: those of all ranks, and of one where transfers run
# beside the computation or between two.
GATHERED, OVERLAPPED, BETWEEN = 3.3, 4.0, 1.0


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of forward + backward beyond the inputs, gradients included.

    dense    eager PyTorch, which has the whole matrix in memory
    fused    this library on `backend`
    """

    dense: int
    fused: int
    backend: str

    @property
    def ratio(self) -> float:
        """How many times more the dense loss needs."""
        return self.dense / self.fused

    def __str__(self) -> str:
        less = f"{self.ratio:,.1f} times less" if self.ratio >= 1 else f"{1 / self.ratio:,.1f} times more"
        return f"dense {mebibytes(self.dense)} MiB, {self.backend!r} {mebibytes(self.fused)} MiB ({less})"


def mebibytes(size: int) -> str:
    """A number of MiB for people: digits behind the point only where there are few before it."""
    mib = size / MIB
    return f"{mib:,.{0 if mib >= 10 else 1 if mib >= 1 else 2}f}"


@dataclass(frozen=True)
class _Sizes:
    """A call in numbers: anchors and columns of the matrix; numbers in z1 and z2, in the queue and in the columns of
    other ranks that are there at a time; how often these are held, with gradients; D; bytes of a number of the inputs
    and of one of the statistics; where it runs, and whether the CPU multiplies there by AMX.
    """

    anchors: int
    columns: int
    own: int
    queue: int
    others: int
    held: float
    dim: int
    item: int
    stats: int
    device: str
    tile_registers: int  # bytes of a number in one of three layouts, 0 without

    @property
    def matrix(self) -> int:
        return self.anchors * self.columns * self.stats

    @property
    def further_columns(self) -> float:
        """Those of other ranks, with their gradient, and a queue of 16 bits in the statistics dtype, twice."""
        widened = 0 if self.item == self.stats else 2 * self.stats + self.item
        return self.held * self.others * self.stats + self.queue * widened


def _dense(c: _Sizes) -> float:
    """Logits, the masked ones, their softmax and its gradient; unit vectors and gradients."""
    return 4 * c.matrix + (5 * c.own + 2 * c.others) * c.stats


def _reference(c: _Sizes) -> float:
    return 6 * c.matrix + 5 * c.own * c.stats + c.further_columns


def _cpu(c: _Sizes) -> float:
    """Unit vectors, their gradient and that of the inputs, across processes what travels; two tiles of every thread.

    The columns once more, as products read them, are gone before the gradient of the inputs comes; they count where
    there are further ones, whose gradient nobody asks for or which are held longer.
    """
    tiles = min(0.8 * MIB * torch.get_num_threads(), 0.75 * c.matrix)
    widened = 0 if c.item == c.stats else c.queue
    columns = max(c.others, c.queue) + c.held * c.others + widened
    rows = (3 if c.others else 2) * c.stats + c.item + 3 * c.tile_registers
    return rows * c.own + columns * c.stats + tiles


def _torch(c: _Sizes) -> float:
    """A small problem keeps its exponentials, and the backward makes two more of them; a large one has a few tiles,
    fewer against a queue, which has no backward."""
    size = row_stats.TILE.get(c.device, row_stats.TILE_ELSEWHERE)
    keys = c.queue // c.dim

    def blocks(columns: int, tiles: float) -> tuple[float, float]:
        """Bytes at the peak, and from there on to the backward."""
        matrix = c.anchors * columns * c.stats
        if matrix <= kept.KEPT_BYTES:
            return 3.2 * matrix, matrix
        return tiles * min(size, c.anchors) * min(size, columns) * c.stats, 0

    batch, held = blocks(c.columns - keys, 6.5)
    widened = c.queue * (0 if c.item == c.stats else c.stats) + c.held * c.others * c.stats
    return max(batch, held + blocks(keys, 2.5)[0]) + 4.5 * c.own * c.stats + widened


def _triton(c: _Sizes) -> float:
    """Forward: operands and the partial results of columns. Backward: operands, their gradient, that of the inputs."""
    if c.queue or c.others:
        return _cuda(c)
    tile_rows = 256 if c.item == 2 else 64
    partials = -(-c.anchors // tile_rows) * c.columns * c.stats
    forward = c.own * c.item + min(launch.WORKSPACE_BYTES, partials)
    weights = min(_weights(c.dim), c.anchors * c.columns * c.item)
    return max(forward, 2 * c.own * c.item + _split_gradient(c) + weights)


def _cuda(c: _Sizes) -> float:
    """Tensor operations around the sweeps: unit vectors, operands and gradients in the statistics dtype."""
    weights = min(_weights(c.dim), c.anchors * c.columns * c.item)
    return 4 * c.own * c.stats + _split_gradient(c) + weights + c.further_columns


def _split_gradient(c: _Sizes) -> int:
    """The gradient of the operands, in as many parts as give every processor something to do."""
    rows = min(8192, c.anchors * c.columns // 128)
    return max(c.own, rows * c.dim) * c.stats


def _weights(dim: int) -> int:
    """The workspace of the weights, for more features than a program holds."""
    return 0 if dim <= 256 else launch.WORKSPACE_BYTES if dim <= launch.WIDE_FEATURES else launch.WIDE_WORKSPACE_BYTES


_MODELS: dict[str, Callable[[_Sizes], float]] = {
    cuda.BACKEND.name: _cuda,
    triton.BACKEND.name: _triton,
    cpu.BACKEND.name: _cpu,
    plain_torch.BACKEND.name: _torch,
    dispatch.REFERENCE: _reference,
}


def estimate_memory(
    batch_size: int,
    dim: int,
    *,
    layout: Literal["two_view", "one_way", "symmetric"] = "two_view",
    queue_size: int = 0,
    world_size: int = 1,
    exchange: Exchange = "gather",
    dtype: torch.dtype = torch.float32,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> MemoryEstimate:
    """Estimate peak memory of InfoNCE, forward and backward, for the dense formula and for a backend of this library.

    batch_size   B, pairs of one rank
    dim          D, features
    layout, queue_size, dtype, operand_dtype  as in the loss
    world_size   ranks of `group`
    exchange     as in `AllRanks`: "gather", every rank holds the candidates of all, "ring", of one other at a time
    backend      a name, also of one that cannot run here; "auto": the one that a call would take on this machine's GPU
                 or, without one, on its CPU
    Returns      bytes, within a factor of 1.5 of what is measured from 1 MiB on. Debiased and decoupled losses take as
                 much; hard negatives, with two exponents, up to twice as much of what is as large as the matrix
    Raises       ValueError or TypeError on values that no loss takes
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("exchange", exchange, EXCHANGES)
    dispatch.check_backend_name(backend)
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    if batch_size < 1 or dim < 1 or world_size < 1 or queue_size < 0:
        raise ValueError(
            "need batch_size, dim, world_size >= 1 and queue_size >= 0; "
            f"got {batch_size}, {dim}, {world_size}, {queue_size}."
        )
    resolved = resolve_operand_dtype(dtype, operand_dtype)
    operands = operand_dtype if isinstance(operand_dtype, str) else resolved
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "auto":
        backend = dispatch.select(backend, device, stats_dtype(dtype), operands, dim).name
    anchors = 2 * batch_size if layout == "two_view" else batch_size
    sizes = _Sizes(
        anchors=anchors,
        columns=anchors * world_size + queue_size,
        own=2 * batch_size * dim,
        queue=queue_size * dim,
        others=anchors * (world_size - 1) * dim,
        held=GATHERED,
        dim=dim,
        item=dtype.itemsize,
        stats=stats_dtype(dtype).itemsize,
        device=device.type,
        tile_registers=cpu.bytes_in_tile_registers(operands),
    )
    dense = int(_dense(sizes))
    if exchange == "ring" and world_size > 1:
        held = OVERLAPPED if OVERLAPS.get(device.type, True) else BETWEEN
        sizes = replace(sizes, columns=anchors + queue_size, others=anchors * dim, held=held)
    return MemoryEstimate(dense, int(_MODELS[backend](sizes)), backend)
