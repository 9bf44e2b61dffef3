"""The streaming primitive: row statistics of scale * u v^T over negatives, and their gradient, without the matrix.

    lse_k,i = log sum_{j negative of i} exp(beta_k s_ij),   s_ij = scale <u_i, v_j>

One operator with its schema, shape function and autograd formula; a backend does the arithmetic. The
gradient is first-order only: a second derivative raises, `backend="reference"` of the losses supports it.

The scale's gradient needs no sweep of its own: sum_ij G_ij <u_i, v_j> = <u, du>/scale (halved for one set, where du
holds both directions).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..numerics import logsumexp_pair
from ..problem import schema
from ..problem.pairs import Gate
from ..problem.problem import Statistics, Upstream
from .problem_call import ProblemCall, as_arguments, of_arguments, of_saved
from .problem_checks import check_cancelled, check_operand_dtype, check_problem
from .registration import FirstOrderOnly, once_differentiable, register, register_autograd, route


def row_stats(
    u: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | Tensor,
    exponents: tuple[float, ...] = (1.0,),
    num_images: int = 0,
    positive_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    only_equal_ids: bool = False,
    ignored: Tensor | None = None,
    gate: Gate | None = None,
    columns: bool = False,
    means: bool = False,
    maximum: bool = False,
    diagnostics: bool = False,
    unit: bool = False,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> Statistics:
    """Log-sum-exps over the negatives of every row, at one or two exponents, in O((N + M) D) memory.

    u            [N, D] float32 or float64, the anchors
    v            [M, D] same dtype, the candidates; None: the anchors themselves (one set, half the work)
    scale        1/temperature > 0, a float or a 0-d tensor of u's dtype and device that may need a gradient
    exponents    one or two beta_k > 0
    num_images, positive_offset, row_ids, col_ids, only_equal_ids, ignored, gate
                 which pairs are no negatives, see problem/pairs.py; ids are int64 [N] and [M] (one set: row_ids only)
    columns      also the statistics of every column over the rows, from the same pass (two sets)
    means        also the mean of the columns weighted by softmax_k, for columns v that need no gradient
    maximum      also the largest logit of every row
    diagnostics  also the largest logit, the sum of logits and the lse at exponent 2 beta_0 of every row
    unit         promise that |<u_i, v_j>| <= 1 up to rounding
    operand_dtype  dtype whose values u and v hold (see numerics.round_operand), default their own; or for float32 one
                 of numerics.SPLIT_PRODUCTS
    Returns      `Statistics`; gradients flow from lse and col_lse to u, v and scale
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run the call
    Cost         2 N M D flops forward (half for one set), 4 to 6 backward. When v needs no gradient (a queue), the
                 gradient of u is made in the forward and the backward costs O(N D).
    """
    call = checked_call(
        u, v, scale=scale, exponents=exponents, num_images=num_images, positive_offset=positive_offset,
        row_ids=row_ids, col_ids=col_ids, only_equal_ids=only_equal_ids, ignored=ignored, gate=gate, columns=columns,
        means=means, unit=unit, operand_dtype=operand_dtype, backend=backend,
    )  # fmt: skip
    needs_gradient = u.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)
    frozen = v is not None and not v.requires_grad and not columns
    means = means or (frozen and needs_gradient and torch.is_grad_enabled())
    wanted = [bool(flag) for flag in (columns, means, diagnostics, maximum)]  # as the operator would, not its route
    return Statistics(*route("row_stats", _RowStats.apply, u, v)(*call, *wanted))


def checked_call(
    u: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | Tensor,
    exponents: tuple[float, ...] = (1.0,),
    num_images: int = 0,
    positive_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    only_equal_ids: bool = False,
    ignored: Tensor | None = None,
    gate: Gate | None = None,
    columns: bool = False,
    means: bool = False,
    unit: bool = False,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> ProblemCall:
    """The first arguments of the operator; raises as `row_stats` does."""
    check_problem(u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, columns, means, backend)
    check_cancelled(u, v, row_ids, col_ids, only_equal_ids, ignored, gate, columns)
    check_operand_dtype(u, operand_dtype)
    rules = num_images, positive_offset, only_equal_ids, row_ids, col_ids, ignored, *schema.gate_arguments(gate)
    return as_arguments(u, v, scale, exponents, (*rules, unit), operand_dtype, backend)


def union(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """lse and aux (of one part, or with diagnostics) over two disjoint sets of columns; gradients flow from lse."""
    (lse, aux), (more, more_aux) = one, other
    merged = aux + more_aux  # count, and with diagnostics the total
    if len(aux) > 1:
        largest = torch.maximum(aux[1], more_aux[1])
        merged = torch.stack([merged[0], largest, merged[2], logsumexp_pair(aux[3], more_aux[3])])
    return logsumexp_pair(lse, more), merged


def _forward(*args) -> tuple[Tensor, ...]:
    call, (columns, means, diagnostics, maximum) = of_arguments(args)
    problem, backend = call.problem()
    return tuple(backend.forward(problem, columns=columns, means=means, diagnostics=diagnostics, maximum=maximum))


def _backward(*args) -> tuple[Tensor, Tensor]:
    call, upstream = of_arguments(args)
    problem, backend = call.problem()
    return backend.backward(problem, Upstream(*upstream))


def _forward_and_kept(args, call, wanted) -> tuple[tuple[Tensor, ...], ModuleType | None, list[Tensor]]:
    """Statistics and, from a backend that keeps the matrix of a small problem, its module and what it keeps."""
    columns, means, diagnostics, maximum = wanted
    keeper = None if diagnostics else call.keeper()
    if keeper is not None:
        made = keeper.forward(call.problem()[0], columns=columns, means=means, maximum=maximum)
        if made is not None:
            return tuple(made.stats), keeper, [*made.blocks, *made.sums]
    with torch._C._AutoDispatchBelowAutograd():
        return route("row_stats", _forward, call.u, call.v)(*args), None, []


def _forward_shapes(u, v, scale, scale_value, exponents, *rest) -> tuple[Tensor, ...]:
    columns, means, diagnostics, maximum = rest[-4:]
    n, m, k = u.shape[0], (u if v is None else v).shape[0], len(exponents)
    parts = 4 if diagnostics else 2 if maximum else 1
    return (
        u.new_empty(k, n),
        u.new_empty(parts, n),
        u.new_empty(k, m) if columns else u.new_empty(0),
        u.new_empty(parts, m) if columns else u.new_empty(0),
        u.new_empty(k, n, u.shape[1]) if means else u.new_empty(0),
    )


def backward_shapes(u, v, *rest) -> tuple[Tensor, Tensor]:
    """Shapes of a gradient, whatever the statistics."""
    need_u, need_v = rest[-2:]
    return (
        torch.empty_like(u) if need_u else u.new_empty(0),
        torch.empty_like(v) if need_v and v is not None else u.new_empty(0),
    )


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        call, wanted = of_arguments(args)
        (lse, aux, col_lse, col_aux, mean), ctx.keeper, kept = _forward_and_kept(args, call, wanted)
        ctx.columns, ctx.frozen, *_ = wanted
        u, v, scale, *pair_tensors = call.tensors()
        ctx.numbers = call.numbers()
        saved = pair_tensors if ctx.keeper is None else kept
        if ctx.frozen:  # with the mean at hand v may change in place (a queue does)
            v, saved = None, []
        ctx.save_for_backward(lse, col_lse, mean, u, v, scale, *saved)
        ctx.mark_non_differentiable(aux, col_aux, mean)
        ctx.set_materialize_grads(False)
        return lse, aux, col_lse, col_aux, mean

    @staticmethod
    def backward(ctx, grad_lse, _aux, grad_col_lse, *_):
        lse, col_lse, mean, u, v, scale, *saved = ctx.saved_tensors
        scale_value, exponents, *_ = ctx.numbers
        need_u, need_v, need_scale = ctx.needs_input_grad[:3]
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
        du = dv = dscale = None
        if ctx.frozen:
            scale = scale_value if scale is None else scale
            du, dscale = FirstOrderOnly.apply(_frozen_gradient, u, scale, exponents, grad_lse, mean)
        elif need_u or need_v or need_scale:
            needs = need_u or need_scale, need_v
            if not ctx.columns:
                col_lse = grad_col_lse = None
            else:
                grad_col_lse = torch.zeros_like(col_lse) if grad_col_lse is None else grad_col_lse.contiguous()
            if ctx.keeper is not None:
                scale = scale_value if scale is None else scale
                du, dv = once_differentiable(
                    ctx.keeper.backward, u, v, scale, exponents, grad_lse, grad_col_lse, *needs, *saved
                )
            else:
                call = of_saved((u, v, scale, *saved), ctx.numbers)
                gradient = route("row_stats_backward", _backward, u, v, grad_lse, grad_col_lse)
                du, dv = once_differentiable(gradient, *call, lse, grad_lse, col_lse, grad_col_lse, *needs)
            if need_scale:
                dscale = (u * du).sum() / (scale if v is not None else 2 * scale)
        gradients = [du if need_u else None, dv if need_v else None, dscale if need_scale else None]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


def _frozen_gradient(u, scale, exponents, grad_lse, mean) -> tuple[Tensor, Tensor]:
    """du and dscale when the columns are frozen: d lse_k,i / d u_i = beta_k scale mean_k,i."""
    pull = sum(beta * a[:, None] * m for beta, a, m in zip(exponents, grad_lse, mean, strict=True))
    return pull * scale, (u * pull).sum()


register("row_stats", schema.row_stats(schema.PROBLEM), _forward, _forward_shapes)
register("row_stats_backward", schema.row_stats_backward(schema.PROBLEM), _backward, backward_shapes)
register_autograd("row_stats", _RowStats)
