"""The streaming primitive of losses that weigh negatives by rank, and its gradient, without the matrix.

    lse_i = log sum_{j negative of i} omega(u_ij) exp(s_ij),   s_ij = scale <u_i, v_j>,   u_ij = rank in row i / N

A sibling of `row_stats` with the same anatomy: schema, shape function, autograd by hand, first derivative only. Ranks
span all columns of a row, so everything an anchor is compared with has to be one call: concatenate, do not merge. The
weights are constants of the gradient: dlse_i/ds_ij = omega e^{s_ij - lse_i}.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..problem import schema
from ..problem.pairs import Gate
from ..problem.ranking import RankedStatistics, Ranking
from .problem_call import as_arguments, of_arguments, of_saved
from .problem_checks import check_cancelled, check_operand_dtype, check_problem
from .registration import once_differentiable, register, register_autograd
from .row_stats import backward_shapes


def ranked_stats(
    u: Tensor,
    v: Tensor | None = None,
    *,
    ranking: Ranking,
    scale: float | Tensor,
    num_images: int = 0,
    positive_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ignored: Tensor | None = None,
    gate: Gate | None = None,
    diagnostics: bool = False,
    unit: bool = False,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> RankedStatistics:
    """Log-sum-exp over the negatives of every row, weighted by their rank in the row.

    u, v, scale, num_images, positive_offset, row_ids, col_ids, ignored, gate, unit, operand_dtype, backend
                 as in `row_stats`
    ranking      the weight as a function of the rank, and the number of histogram bins (0: exact ranks)
    diagnostics  also what `RankedStatistics.aux` lists
    Returns      `RankedStatistics`; gradients flow from lse to u, v and scale
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run the call
    Cost         exact: 8 N M D flops and two sorts of every row; histogram: 5 N M D (one set) or 8. Memory beyond u, v
                 and their gradients: a block of whole rows per thread, and (bins + 4) N numbers for a histogram
    """
    check_problem(u, v, scale, (1.0,), num_images, positive_offset, row_ids, col_ids, False, False, backend)
    check_cancelled(u, v, row_ids, col_ids, False, ignored, gate, False)
    check_operand_dtype(u, operand_dtype)
    rules = num_images, positive_offset, False, row_ids, col_ids, ignored, *schema.gate_arguments(gate)
    call = as_arguments(u, v, scale, [1.0], (*rules, unit), operand_dtype, backend)
    parameters = [ranking.tau_plus, ranking.alpha, ranking.beta, ranking.eps]
    return RankedStatistics(
        *torch.ops.contrastive_ext.ranked_stats.default(*call, parameters, ranking.bins, diagnostics)
    )


def _forward(*args) -> tuple[Tensor, ...]:
    call, (parameters, bins, diagnostics) = of_arguments(args)
    problem, backend = call.problem()
    return tuple(backend.ranked_forward(problem, _ranking(parameters, bins), diagnostics=diagnostics))


def _backward(*args) -> tuple[Tensor, Tensor]:
    call, (parameters, bins, *stats, grad_lse, need_u, need_v) = of_arguments(args)
    problem, backend = call.problem()
    ranking = _ranking(parameters, bins)
    return backend.ranked_backward(problem, ranking, RankedStatistics(*stats), grad_lse, need_u=need_u, need_v=need_v)


def _forward_and_kept(args, call, wanted) -> tuple[tuple[Tensor, ...], ModuleType | None, list[Tensor]]:
    """As in row_stats.py."""
    parameters, bins, diagnostics = wanted
    keeper = None if diagnostics or bins else call.keeper()
    if keeper is not None:
        made = keeper.ranked_forward(call.problem()[0], _ranking(parameters, bins))
        if made is not None:
            return tuple(made.stats), keeper, [*made.blocks, *made.sums]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.contrastive_ext.ranked_stats.default(*args), None, []


def _ranking(parameters: list[float], bins: int) -> Ranking:
    tau_plus, alpha, beta, eps = parameters
    return Ranking(tau_plus, alpha, beta, eps, bins)


def _forward_shapes(u, *rest) -> tuple[Tensor, ...]:
    bins, diagnostics = rest[-2:]
    n = u.shape[0]
    axis, below = ((3, n), (n, bins + 1)) if bins else ((0,), (0,))
    return u.new_empty(n), u.new_empty(6 if diagnostics else 1, n), u.new_empty(axis), u.new_empty(below)


class _RankedStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        call, wanted = of_arguments(args)
        (lse, aux, axis, below), ctx.keeper, kept = _forward_and_kept(args, call, wanted)
        u, v, scale, *pair_tensors = call.tensors()
        ctx.numbers, ctx.ranking = call.numbers(), wanted[:2]
        saved = (*pair_tensors, lse, aux, axis, below) if ctx.keeper is None else kept
        ctx.save_for_backward(u, v, scale, *saved)
        ctx.mark_non_differentiable(aux, axis, below)
        ctx.set_materialize_grads(False)
        return lse, aux, axis, below

    @staticmethod
    def backward(ctx, grad_lse, *_):
        u, v, scale, *saved = ctx.saved_tensors
        scale_value, exponents, *_ = ctx.numbers
        need_u, need_v, need_scale = ctx.needs_input_grad[:3]
        du = dv = dscale = None
        if grad_lse is not None:
            needs = need_u or need_scale, need_v
            if ctx.keeper is not None:
                scale = scale_value if scale is None else scale
                du, dv = once_differentiable(
                    ctx.keeper.backward, u, v, scale, exponents, grad_lse[None], None, *needs, *saved
                )
            else:
                call = of_saved((u, v, scale, *saved[:-4]), ctx.numbers)
                du, dv = torch.ops.contrastive_ext.ranked_stats_backward.default(
                    *call, *ctx.ranking, *saved[-4:], grad_lse.contiguous(), *needs
                )
            if need_scale:
                dscale = (u * du).sum() / (scale if v is not None else 2 * scale)
        gradients = [du if need_u else None, dv if need_v else None, dscale]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


_STATISTICS = "Tensor lse, Tensor aux, Tensor axis, Tensor below"
register("ranked_stats", schema.ranked_stats(schema.PROBLEM), _forward, _forward_shapes)
register("ranked_stats_backward", schema.ranked_stats_backward(schema.PROBLEM, _STATISTICS), _backward, backward_shapes)
register_autograd("ranked_stats", _RankedStats)
