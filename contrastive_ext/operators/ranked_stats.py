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

from ..problem.pairs import Gate
from ..problem.ranking import RankedStatistics, Ranking
from .row_stats import (
    _PROBLEM,
    PAIR_NUMBERS,
    FirstOrderOnly,
    _backward_shapes,
    _check,
    _check_cancelled,
    _problem,
    _tensors,
    keeper_of,
    once_differentiable,
)

_RANKING = "float[] ranking, int bins"
_library = torch.library.Library("contrastive_ext", "FRAGMENT")
_library.define(
    f"ranked_stats({_PROBLEM}, {_RANKING}, bool diagnostics) -> (Tensor lse, Tensor aux, Tensor axis, Tensor below)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"ranked_stats_backward({_PROBLEM}, {_RANKING}, Tensor lse, Tensor aux, Tensor axis, Tensor below, "
    "Tensor grad_lse, bool need_u, bool need_v) -> (Tensor du, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    gate: Gate | None = None,
    diagnostics: bool = False,
    unit: bool = False,
    operand_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> RankedStatistics:
    """Log-sum-exp over the negatives of every row, weighted by their rank in the row.

    u, v, scale, num_images, positive_offset, row_ids, col_ids, gate, unit, operand_dtype, backend
                 as in `row_stats`
    ranking      the weight as a function of the rank, and the number of histogram bins (0: exact ranks)
    diagnostics  also what `RankedStatistics.aux` lists
    Returns      `RankedStatistics`; gradients flow from lse to u, v and scale
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run the call
    Cost         exact: 8 N M D flops and two sorts of every row; histogram: 5 N M D (one set) or 8. Memory beyond u, v
                 and their gradients: a block of whole rows per thread, and (bins + 4) N numbers for a histogram
    """
    _check(u, v, scale, (1.0,), num_images, positive_offset, row_ids, col_ids, False, False, backend)
    _check_cancelled(u, v, row_ids, col_ids, False, None, gate, False)
    scale_tensor = scale if isinstance(scale, Tensor) else None
    return RankedStatistics(
        *torch.ops.contrastive_ext.ranked_stats.default(
            u, v, scale_tensor, 0.0 if scale_tensor is not None else float(scale), [1.0], num_images, positive_offset,
            False, row_ids, col_ids, None, *_tensors(gate), unit, operand_dtype or u.dtype, backend,
            [ranking.tau_plus, ranking.alpha, ranking.beta, ranking.eps], ranking.bins, diagnostics,
        )
    )  # fmt: skip


def _forward(*args) -> tuple[Tensor, ...]:
    *problem_args, ranking, bins, diagnostics = args
    problem, backend = _problem(*problem_args)
    return tuple(backend.ranked_forward(problem, _ranking(ranking, bins), diagnostics=diagnostics))


def _forward_and_kept(*args) -> tuple[tuple[Tensor, ...], ModuleType | None, list[Tensor]]:
    """As in row_stats.py."""
    *problem_args, ranking, bins, diagnostics = args
    keeper = None if diagnostics or bins else keeper_of(*problem_args)
    if keeper is not None:
        made = keeper.ranked_forward(_problem(*problem_args)[0], _ranking(ranking, bins))
        if made is not None:
            return tuple(made.stats), keeper, [*made.blocks, *made.sums]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.contrastive_ext.ranked_stats.default(*args), None, []


def _backward(*args) -> tuple[Tensor, Tensor]:
    *problem_args, ranking, bins, lse, aux, axis, below, grad_lse, need_u, need_v = args
    problem, backend = _problem(*problem_args)
    stats = RankedStatistics(lse, aux, axis, below)
    return backend.ranked_backward(problem, _ranking(ranking, bins), stats, grad_lse, need_u=need_u, need_v=need_v)


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
        (lse, aux, axis, below), ctx.keeper, kept = _forward_and_kept(*args)
        u, v, scale, scale_value, exponents, *rest = args
        *pairs, unit, operand_dtype, backend, ranking, bins, _ = rest
        ctx.options = scale_value, exponents, pairs[:PAIR_NUMBERS], (unit, operand_dtype, backend, ranking, bins)
        saved = (lse, aux, axis, below, *pairs[PAIR_NUMBERS:]) if ctx.keeper is None else kept
        ctx.save_for_backward(u, v, scale, *saved)
        ctx.mark_non_differentiable(aux, axis, below)
        ctx.set_materialize_grads(False)
        return lse, aux, axis, below

    @staticmethod
    def backward(ctx, grad_lse, *_):
        u, v, scale, *saved = ctx.saved_tensors
        scale_value, exponents, pair_numbers, how = ctx.options
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
                stats, pair_tensors = saved[:4], saved[4:]
                du, dv = torch.ops.contrastive_ext.ranked_stats_backward.default(
                    u, v, scale, scale_value, exponents, *pair_numbers, *pair_tensors, *how, *stats,
                    grad_lse.contiguous(), *needs,
                )  # fmt: skip
            if need_scale:
                dscale = (u * du).sum() / (scale if v is not None else 2 * scale)
        gradients = [du if need_u else None, dv if need_v else None, dscale]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


def _forward_with_autograd(*args):
    return _RankedStats.apply(*args)


def _backward_with_autograd(*args):
    return FirstOrderOnly.apply(torch.ops.contrastive_ext.ranked_stats_backward.default, *args)


_library.impl("ranked_stats", _forward, "CompositeExplicitAutograd")
_library.impl("ranked_stats_backward", _backward, "CompositeExplicitAutograd")
_library.impl("ranked_stats", _forward_with_autograd, "Autograd")
_library.impl("ranked_stats_backward", _backward_with_autograd, "Autograd")
torch.library.register_fake("contrastive_ext::ranked_stats", _forward_shapes, lib=_library)
torch.library.register_fake("contrastive_ext::ranked_stats_backward", _backward_shapes, lib=_library)
