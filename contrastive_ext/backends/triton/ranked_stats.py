"""Ranked statistics of the `triton` backend: histograms by kernels, exact ranks by the `torch` backend's library sort.

Forward: three sweeps (triton_kernels/histogram_ranks.py) with O(N bins) work between them. Backward: the kernel of the
plain statistics, which looks omega up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...problem.problem import Problem
from ...problem.ranking import RankedStatistics, Ranking, histogram_axis
from ..torch import ranked_stats as torch_ranked
from . import launch, replay
from . import pairs as triton_pairs
from .gradient import Ranks, Term, gradients, total

WITH_SQUARES = (1.0, 2.0)  # exponents of the weighted terms whose sums the forward makes


def ranked_forward(problem: Problem, ranking: Ranking, *, diagnostics: bool) -> RankedStatistics:
    """Ranked statistics of `problem`; see `RankedStatistics`."""
    if not ranking.bins:
        return torch_ranked.ranked_forward(problem, ranking, diagnostics=diagnostics)
    problem = _in_float32(problem)
    u, n, bins = problem.u, problem.pairs.num_rows, ranking.bins
    with launch.on_device(u.device):
        partial = _sweep(problem, "RANGE", bins, parts=2)
        lowest, highest = partial[:, 0].amin(0), partial[:, 1].amax(0)
        axis = histogram_axis(lowest, highest, torch.ones_like(lowest), bins)
        counts = torch.zeros(n, bins, dtype=torch.int32, device=u.device)
        _sweep(problem, "COUNT", bins, parts=0, axis=axis, counts=counts)
        below = u.new_zeros(n, bins + 1)
        below[:, 1:] = counts.cumsum(1)
        count = below[:, -1].clone()
        axis[2] = count.clamp(min=1)
        partial = _sweep(problem, "SUMS", bins, parts=5, axis=axis, below=below, shape=_shape(ranking, u))
    lse, aux = partial[:, 0].logsumexp(0), count[None]
    if diagnostics:
        total, weights = partial[:, 2].sum(0), partial[:, 3].sum(0)
        aux = torch.stack([count, highest, total, partial[:, 1].logsumexp(0), weights, partial[:, 4].amax(0)])
    return RankedStatistics(lse, aux, axis, below)


def ranked_backward(
    problem: Problem, ranking: Ranking, stats: RankedStatistics, grad_lse: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    if not ranking.bins:
        return torch_ranked.ranked_backward(problem, ranking, stats, grad_lse, need_u=need_u, need_v=need_v)
    problem = _in_float32(problem)
    ranks = Ranks(ranking.bins, stats.axis, stats.below, _shape(ranking, stats.lse))
    term = Term(stats.lse[None].contiguous(), grad_lse[None].contiguous(), ranks)
    with launch.on_device(problem.u.device):
        found = gradients(problem, term, None, need_u, need_v)
        du, dv = (problem.u.new_empty(0) if x is None else total(x) for x in found)
    return du, dv


def _in_float32(problem: Problem) -> Problem:
    """The problem without products of parts: each of the four sweeps has to find the same bin for a pair."""
    return replace(problem, products="") if problem.products else problem


def _sweep(
    problem: Problem,
    name: str,
    bins: int,
    parts: int,
    *,
    axis: Tensor | None = None,
    below: Tensor | None = None,
    shape: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Partial results [splits, parts, N] of one pass of the kernel."""
    u, v = launch.operands(problem)
    rows, cols = triton_pairs.sides(problem, u, v)
    rule = triton_pairs.costliest_rule(problem.pairs)
    # a mask for every tile, whatever the rules
    config = launch.config_of("forward", u, "ids" if rule == "images" else rule, ranked=name == "SUMS")
    scale, scale_is_tensor = launch.scale_argument(problem)
    tiles = launch.cdiv(len(u), config.block_m)
    splits, span = launch.split(tiles, len(v), config.block_n, 2 * launch.processors(u.device))
    out = problem.u.new_empty(splits, parts, len(u))
    replay.start(
        launch.kernels().histogram_ranks.histogram_ranks_kernel, (tiles, splits),
        (u, u.stride(0)), (v, v.stride(0)), scale, (axis, below), shape, counts, out,
        span=span, PASS=name, BINS=bins, EXPONENTS=WITH_SQUARES, SCALE_IS_TENSOR=scale_is_tensor,
        **launch.tile_arguments(config, u),
        **triton_pairs.arguments(problem.pairs, rows, cols, row_anchors=True, col_anchors=False),
    )  # fmt: skip
    return out


def _shape(ranking: Ranking, like: Tensor) -> Tensor:
    """The coefficients of omega on the device; filled there, because a copy from the host would wait for it."""
    return torch.stack([like.new_full((), value) for value in ranking.coefficients])
