"""The `cpu` backend: hand-written C++ tiles (csrc/), float32 and float64.

16-bit operands are widened to float32; products of bf16 ones run on AMX where the CPU has it, with the same accuracy,
and so do products of float32 ones cut into three bf16 parts, on request (operand_dtype="bf16x3").
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..problem.pairs import Candidates
from ..problem.problem import PairSums, Problem, Statistics, Upstream
from ..problem.ranking import RankedStatistics, Ranking
from ..problem.schema import pair_arguments
from ..problem.short_road import WholeLossOps, backward_shapes, forward_shapes
from . import native
from .backend import Backend, UnitRows, lacks_products

SPLIT = "bf16x3"  # of numerics.SPLIT_PRODUCTS


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> str | None:
    """None, or why the native CPU kernels cannot take this call."""
    if device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {device}."
    lacking = lacks_products(operand_dtype, SPLIT) or native.why_missing()
    if lacking is not None or operand_dtype != SPLIT:
        return lacking
    _, reason = _bf16_products(operand_dtype)
    return f"its {SPLIT!r} products need AMX: {reason}." if reason else None


def note(operand_dtype: torch.dtype | str) -> str:
    """Who multiplies bf16 operands, for `explain`."""
    who, reason = _bf16_products(operand_dtype)
    return f"bf16 products widened to float32: {reason}" if reason else f"bf16 products: {who}" if who else ""


def bytes_in_tile_registers(operand_dtype: torch.dtype | str) -> int:
    """Of a number as AMX reads it, in three layouts; 0 where products of such operands do not run on it."""
    who, reason = _bf16_products(operand_dtype)
    return 0 if not who or reason else 6 if operand_dtype == SPLIT else 2


def _bf16_products(operand_dtype: torch.dtype | str) -> tuple[str, str]:
    """Who multiplies, "" for other operands, and why they are widened, if they are."""
    if operand_dtype not in (torch.bfloat16, SPLIT) or native.why_missing() is not None:
        return "", ""
    who, _, reason = native.build_info()["cpu_bf16"].partition(": ")
    return who, reason


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`."""
    wanted = (columns, means, diagnostics, maximum)
    return Statistics(*torch.ops.contrastive_ext.row_stats_forward_cpu.default(*_arguments(problem), *wanted))


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    return torch.ops.contrastive_ext.row_stats_backward_cpu.default(
        *_arguments(problem),
        upstream.lse,
        upstream.grad_lse,
        upstream.col_lse,
        upstream.grad_col_lse,
        upstream.need_u,
        upstream.need_v,
    )


def top_columns(scorers: Tensor, features: Tensor | None, k: int, which: Candidates) -> tuple[Tensor, Tensor]:
    """Scores and columns [G, k] of the k best columns of every image; see operators/top_columns.py."""
    return torch.ops.contrastive_ext.top_columns_cpu(
        scorers, features, k, which.num_images, which.col_ids, which.row_ids, which.excluded, which.below
    )


def whole_loss(dtype: torch.dtype, numbers: int) -> WholeLossOps | None:
    """The operators of the short road."""
    return _whole_loss()


@cache
def _whole_loss() -> WholeLossOps:
    torch.library.register_fake("contrastive_ext::whole_loss_forward_cpu", forward_shapes)
    torch.library.register_fake("contrastive_ext::whole_loss_backward_cpu", backward_shapes)
    ops = torch.ops.contrastive_ext
    return WholeLossOps(ops.whole_loss_forward_cpu.default, ops.whole_loss_backward_cpu.default)


def unit_rows(dtype: torch.dtype) -> UnitRows:
    """Its functions for rows of unit length."""
    ops = torch.ops.contrastive_ext
    return UnitRows(ops.unit_rows_cpu.default, ops.unit_rows_backward_cpu.default)


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


def pair_sums(problem: Problem, offset: Tensor, sign: float) -> PairSums:
    """Sums over the selected columns of every row; see `PairSums`."""
    return PairSums(*torch.ops.contrastive_ext.pair_sums_forward_cpu.default(*_arguments(problem), offset, sign))


def pair_sums_backward(
    problem: Problem, offset: Tensor, sign: float, grad_sum: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv, an empty tensor where not needed."""
    return torch.ops.contrastive_ext.pair_sums_backward_cpu.default(
        *_arguments(problem), offset, sign, grad_sum, need_u, need_v
    )


def _arguments(problem: Problem) -> tuple:
    """In the order of `schema.NATIVE_PROBLEM`."""
    scale = float(problem.scale)  # already on the host
    col_ids = None if problem.one_set else problem.pairs.col_ids
    pairs = pair_arguments(problem.pairs, col_ids, problem.unit)
    return problem.u, problem.v, scale, list(problem.exponents), *pairs, bool(problem.products)


BACKEND = Backend(
    name="cpu",
    why_not=why_not,
    forward=forward,
    backward=backward,
    top_columns=top_columns,
    ranked_forward=ranked_forward,
    ranked_backward=ranked_backward,
    pair_sums=pair_sums,
    pair_sums_backward=pair_sums_backward,
    whole_loss=whole_loss,
    unit_rows=unit_rows,
    note=note,
)
