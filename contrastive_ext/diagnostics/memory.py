"""How much memory a loss needs beside its inputs and their gradients, before you run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batch.request import LAYOUTS, Layout
from ..numerics import SUPPORTED_DTYPES, stats_dtype

# Copies of the [N, M] matrix alive at the peak of eager PyTorch's forward + backward (logits, mask, softmax, gradient);
# measured 3.2 at N = 16,384 on the CPU (docs/measurements.md).
DENSE_COPIES = 3.2
# [rows, D] arrays of the statistics dtype alive at the fused peak: unit vectors, operands, their gradients.
FUSED_COPIES = 8
# Tiles and partial sums, whatever N is.
FUSED_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of forward + backward beyond the inputs and their gradients."""

    dense: int
    fused: int

    @property
    def ratio(self) -> float:
        """How many times more the dense loss needs."""
        return self.dense / self.fused

    def __str__(self) -> str:
        return (
            f"dense {self.dense / 2**20:,.0f} MiB, fused {self.fused / 2**20:,.0f} MiB ({self.ratio:,.0f} times less)"
        )


def estimate_memory(
    batch_size: int,
    dim: int,
    *,
    layout: Layout = "two_view",
    queue_size: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> MemoryEstimate:
    """Estimate peak memory of one loss, forward and backward, for the dense formula and for the fused one.

    batch_size   B, pairs of one rank
    dim          D, features
    layout, queue_size, dtype  as in the loss
    world_size   ranks of `group`, whose candidates every rank holds
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    if batch_size < 1 or dim < 1 or world_size < 1 or queue_size < 0:
        raise ValueError(
            "need batch_size, dim, world_size >= 1 and queue_size >= 0; "
            f"got {batch_size}, {dim}, {world_size}, {queue_size}."
        )
    itemsize = stats_dtype(dtype).itemsize
    rows = 2 * batch_size if layout == "two_view" else batch_size
    columns = rows * world_size + queue_size
    return MemoryEstimate(
        dense=int(DENSE_COPIES * rows * columns * itemsize),
        fused=FUSED_COPIES * (rows + columns) // 2 * dim * itemsize + FUSED_WORKSPACE,
    )
