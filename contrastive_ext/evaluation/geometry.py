"""Alignment and uniformity of an embedding on the sphere (Wang & Isola, ICML 2020, arXiv:2005.10242)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics
from ..batch.request import check_pairs
from ..checks import check_positive, check_tensor, describe
from ..operators.row_stats import row_stats
from ..operators.unit_rows import operand


def alignment(z1: Tensor, z2: Tensor, alpha: float = 2.0) -> Tensor:
    """0-d mean of |u1_i - u2_i|^alpha over pairs of unit rows, with gradient: 0 where both views are mapped together.

    z1, z2   [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    alpha    > 0
    Raises   ValueError/TypeError on shapes, dtypes, ranges
    Cost     O(B D)
    """
    check_pairs(z1, z2, "two_view")
    check_positive("alpha", alpha, torch.float64)
    with numerics.without_autocast(z1):
        dtype = numerics.stats_dtype(z1.dtype)
        u1, u2 = (numerics.normalize(z.to(dtype)) for z in (z1, z2))
        squared = (u1 - u2).square().sum(1)
        if alpha == 2:
            return squared.mean()
        apart = squared > 0  # a distance of 0 has no derivative
        return squared.masked_fill(~apart, 1.0).pow(alpha / 2).where(apart, 0.0).mean()


def uniformity(z: Tensor, t: float = 2.0, *, backend: str = "auto") -> Tensor:
    """0-d log of the mean of e^{-t |u_i - u_j|^2} over pairs i != j of unit rows, with gradient; lower is more uniform.

    z        [N >= 2, D] fp16/bf16/fp32/fp64
    t        > 0
    Raises   ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory   O(N D), time O(N^2 D): log-sum-exps of the rows at scale 2 t; once differentiable
    """
    check_tensor("z", z)
    if z.dtype not in numerics.SUPPORTED_DTYPES or z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(f"z must be floating-point [N, D] with N >= 2; got {describe(z)}.")
    check_positive("t", t, numerics.stats_dtype(z.dtype))
    with numerics.without_autocast(z):
        u = operand(z, True, backend=backend)
        n = u.shape[0]
        lse = row_stats(u, scale=2.0 * t, num_images=n, unit=True, operand_dtype=z.dtype, backend=backend).lse[0]
        # |u - v|^2 = 2 - 2 <u, v>, of rows that a 16-bit dtype has rounded nearly
        return lse.logsumexp(0) - 2.0 * t - math.log(n) - math.log(n - 1)
