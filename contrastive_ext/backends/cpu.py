"""The `cpu` backend: hand-written C++ tiles (csrc/), float32 and float64, 16-bit operands widened to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..problem import Problem, Statistics, Upstream
from ..ranking import RankedStatistics, Ranking

NAME = "cpu"


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype, dim: int) -> str | None:
    """None, or why the native CPU kernels cannot take this call."""
    if device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {device}."
    return native.why_missing()


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`."""
    outputs = torch.ops.contrastive_ext.row_stats_forward_cpu(*_arguments(problem), columns, means, diagnostics)
    return Statistics(*outputs)


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    return torch.ops.contrastive_ext.row_stats_backward_cpu(
        *_arguments(problem),
        upstream.lse,
        upstream.grad_lse,
        upstream.col_lse,
        upstream.grad_col_lse,
        upstream.need_u,
        upstream.need_v,
    )


def ranked_forward(problem: Problem, ranking: Ranking, *, diagnostics: bool) -> RankedStatistics:
    """Ranked statistics of `problem`; see `RankedStatistics`."""
    rule = list(ranking.coefficients), ranking.bins
    return RankedStatistics(
        *torch.ops.contrastive_ext.ranked_stats_forward_cpu(*_arguments(problem), *rule, diagnostics)
    )


def ranked_backward(
    problem: Problem, ranking: Ranking, stats: RankedStatistics, grad_lse: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    rule = list(ranking.coefficients), ranking.bins
    return torch.ops.contrastive_ext.ranked_stats_backward_cpu(
        *_arguments(problem), *rule, stats.lse, stats.axis, stats.below, grad_lse, need_u, need_v
    )


def _arguments(problem: Problem) -> tuple:
    pairs = problem.pairs
    return (
        problem.u,
        problem.v,
        float(problem.scale),  # already on the host
        list(problem.exponents),
        pairs.num_images,
        pairs.positive_offset,
        pairs.row_ids,
        None if problem.one_set else pairs.col_ids,
        problem.unit,
    )
