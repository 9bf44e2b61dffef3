"""The streaming primitive of losses that are sums over pairs, and its gradient, without the matrix.

    sum_i = sum_{j selected for i} softplus(sign s_ij + offset_i),   s_ij = scale <u_i, v_j>

A sibling of `row_stats` without a running maximum: terms add up as they are. Its derivative by the offset is a sum of
sigmoids, made beside the sum; d sum_i/d s_ij = sign sigmoid(sign s_ij + offset_i) wants a sweep. Rows against
themselves are given as both sets. First derivative only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import describe
from ..problem import schema
from ..problem.pairs import Gate
from ..problem.problem import PairSums
from .problem_call import SIZE, ProblemCall, of_arguments, of_saved
from .registration import once_differentiable, register, register_autograd, route
from .row_stats import backward_shapes, checked_call


def pair_sums(
    u: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor,
    offset: Tensor,
    sign: int = 1,
    num_images: int = 0,
    positive_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    only_equal_ids: bool = False,
    ignored: Tensor | None = None,
    gate: Gate | None = None,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> PairSums:
    """Sum of softplus(sign s_ij + offset_i) over the selected columns of every row, in O((N + M) D) memory.

    u, v, scale, num_images, positive_offset, row_ids, col_ids, only_equal_ids, ignored, gate, operand_dtype, backend
             as in `row_stats`; a selected column is what is a negative there
    offset   [N] of u's dtype, with gradient; -inf makes every term of a row 0
    sign     1 or -1
    Returns  `PairSums`; gradients flow from `sum` to u, v, scale and offset. A row without columns has sum 0
    Raises   ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run the call
    Cost     2 N M D flops forward, 6 backward
    """
    call = checked_sums(
        u, v, offset, sign, scale=scale, num_images=num_images, positive_offset=positive_offset, row_ids=row_ids,
        col_ids=col_ids, only_equal_ids=only_equal_ids, ignored=ignored, gate=gate, operand_dtype=operand_dtype,
        backend=backend,
    )  # fmt: skip
    return PairSums(*route("pair_sums", _PairSums.apply, u, v, offset)(*call, offset, float(sign)))


def checked_sums(u: Tensor, v: Tensor, offset: Tensor, sign: int, **options) -> ProblemCall:
    """The first arguments of the operator; raises as `pair_sums` does."""
    call = checked_call(u, v, **options)
    if offset.shape != u.shape[:1] or offset.dtype != u.dtype or offset.device != u.device:
        raise ValueError(f"offset must be {u.dtype} [{u.shape[0]}] on {u.device}; got {describe(offset)}.")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1; got {sign!r}.")
    return call


def _forward(*args) -> tuple[Tensor, ...]:
    call, (offset, sign) = of_arguments(args)
    problem, backend = call.problem()
    return tuple(backend.pair_sums(problem, offset.detach().contiguous(), sign))


def _backward(*args) -> tuple[Tensor, Tensor]:
    call, (offset, sign, grad_sum, need_u, need_v) = of_arguments(args)
    problem, backend = call.problem()
    return backend.pair_sums_backward(problem, offset.contiguous(), sign, grad_sum, need_u=need_u, need_v=need_v)


def _shapes(u, *rest) -> tuple[Tensor, ...]:
    return u.new_empty(u.shape[0]), u.new_empty(u.shape[0]), u.new_empty(u.shape[0])


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        call, (offset, ctx.sign) = of_arguments(args)
        with torch._C._AutoDispatchBelowAutograd():
            total, slope, count = route("pair_sums", _forward, call.u, call.v, offset)(*args)
        ctx.numbers = call.numbers()
        ctx.save_for_backward(*call.tensors(), offset, slope)
        ctx.mark_non_differentiable(slope, count)
        ctx.set_materialize_grads(False)
        return total, slope, count

    @staticmethod
    def backward(ctx, grad_sum, *_):
        *tensors, offset, slope = ctx.saved_tensors
        need_u, need_v, need_scale, need_offset = (ctx.needs_input_grad[i] for i in (0, 1, 2, SIZE))
        du = dv = dscale = doffset = None
        if grad_sum is not None:
            if need_u or need_v or need_scale:
                call = of_saved(tensors, ctx.numbers)
                gradient = route("pair_sums_backward", _backward, call.u, call.v, grad_sum)
                du, dv = once_differentiable(
                    gradient, *call, offset, ctx.sign, grad_sum.contiguous(), need_u or need_scale, need_v
                )
                if need_scale:
                    dscale = (call.u * du).sum() / call.scale
            if need_offset:
                doffset = grad_sum * slope
        others = [None] * (len(ctx.needs_input_grad) - SIZE - 1)
        gradients = [du if need_u else None, dv if need_v else None, dscale, *[None] * (SIZE - 3)]
        return (*gradients, doffset, *others)


register("pair_sums", schema.pair_sums(schema.PROBLEM), _forward, _shapes)
register("pair_sums_backward", schema.pair_sums_backward(schema.PROBLEM), _backward, backward_shapes)
register_autograd("pair_sums", _PairSums)
