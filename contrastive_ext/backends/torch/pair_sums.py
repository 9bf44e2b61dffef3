"""Sums over pairs of the `torch` backend: tiles in plain PyTorch, any device, any dtype.

forward   x = sign s + offset, tile by tile -> sums of softplus(x) and sigmoid(x) of every row
backward  w = g_i sign sigmoid(x) -> du = scale w v, dv = scale w^T u
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...problem.problem import PairSums, Problem
from .row_stats import TILE, TILE_ELSEWHERE


def forward(problem: Problem, offset: Tensor, sign: float) -> PairSums:
    """Sums over the selected columns of every row; see `PairSums`."""
    sums = [problem.u.new_zeros(problem.pairs.num_rows) for _ in PairSums._fields]
    for rows, _, x, keep in _tiles(problem, offset, sign):
        value, share = x.clamp(min=0) + x.abs().neg_().exp_().log1p_(), x.sigmoid()
        for total, term in zip(sums, (value, share, torch.ones_like(x)), strict=True):
            total[rows] += (term if keep is None else term.where(keep, 0.0)).sum(1)
    return PairSums(*sums)


def backward(
    problem: Problem, offset: Tensor, sign: float, grad_sum: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv, an empty tensor where not needed."""
    u, v = problem.u * problem.scale, problem.columns
    du = torch.zeros_like(u) if need_u else None
    dv = torch.zeros_like(v) if need_v else None
    coefficient = sign * grad_sum
    for rows, cols, x, keep in _tiles(problem, offset, sign):
        w = x.sigmoid_().mul_(coefficient[rows, None])
        w = w if keep is None else w.where(keep, 0.0)
        if du is not None:
            du[rows].addmm_(w, v[cols])
        if dv is not None:
            dv[cols].addmm_(w.T, u[rows])  # u carries the scale already
    return u.new_empty(0) if du is None else du.mul_(problem.scale), u.new_empty(0) if dv is None else dv


def _tiles(problem: Problem, offset: Tensor, sign: float) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Slices, x and which pairs are selected (None: all) of every tile."""
    u, v, pairs = problem.u * (sign * problem.scale), problem.columns, problem.pairs
    size = TILE.get(u.device.type, TILE_ELSEWHERE)
    for i in range(0, pairs.num_rows, size):
        rows = slice(i, min(i + size, pairs.num_rows))
        for j in range(0, pairs.num_columns, size):
            cols = slice(j, min(j + size, pairs.num_columns))
            yield rows, cols, torch.addmm(offset[rows, None], u[rows], v[cols].T), pairs.keep(rows, cols)
