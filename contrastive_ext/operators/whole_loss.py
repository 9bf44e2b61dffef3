"""The short road: a built-in loss over plain pairs in one operator each way, where a backend has one.

    forward   unit rows, positives -> sweep -> row losses and their derivatives -> reduction
    backward  derivatives times the upstream gradient -> sweep -> gradient of the unit rows

The composed road is thirty small tensor operations around the same sweeps: for a small batch more than
the sweeps themselves. The short road takes what most calls are, a loss with a `formula` over one set of candidates;
queues, explicit negatives, `positives`, ids, statistics and losses written as `from_stats` take the composed one, and
so does torch.compile, which fuses small operations itself. Both give the same numbers to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..numerics import stats_dtype
from ..problem.problem import Formula
from ..problem.short_road import WholeLossOps
from .registration import holds_numbers, once_differentiable


def operators_for(z1: Tensor, z2: Tensor, layout: str, backend: str) -> WholeLossOps | None:
    """The operators of the short road for checked z1, z2 without further candidates, or None: the composed road.

    Candidates that need no gradient stay on the composed road: there the anchors' gradient is made in the forward.
    """
    if backend == dispatch.REFERENCE or torch.compiler.is_compiling():
        return None
    if layout == "one_way" and not z2.requires_grad:
        return None
    chosen = dispatch.select(backend, z1.device, stats_dtype(z1.dtype), z1.dtype, z1.shape[1])
    rows, columns = (2 * len(z1), 2 * len(z1)) if layout == "two_view" else (len(z1), len(z2))
    return chosen.whole_loss(z1.dtype, rows * columns)


def whole_loss(
    operators: WholeLossOps,
    formula: Formula,
    exponents: tuple[float, ...],
    z1: Tensor,
    z2: Tensor,
    scale: float | Tensor,
    layout: str,
    normalize: bool,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, [] or [R], once differentiable in z1, z2 and scale, and the share of rows on a debiasing floor.

    The latter is None for a formula without parameters: only a debiased sum has a floor.
    """
    name, parameters = formula
    scale_tensor, scale_value = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    loss, clamped = _WholeLoss.apply(
        operators, z1, z2, scale_tensor, scale_value, layout, normalize, name, parameters, exponents, reduction
    )
    return loss, clamped if parameters else None


class _WholeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, z1, z2, scale, scale_value, layout, normalize, name, parameters, exponents, reduction):
        z1, z2 = z1.contiguous(), z2.contiguous()
        forward = operators.directly[0] if operators.directly and holds_numbers(z1, z2, scale) else operators.forward
        loss, *state, clamped = forward(
            z1, z2, scale, scale_value, layout, normalize, name, parameters, exponents, reduction
        )
        ctx.operators = operators
        ctx.options = (scale_value, layout, normalize, exponents, reduction)
        ctx.save_for_backward(z1, z2, scale, *state)
        ctx.mark_non_differentiable(clamped)
        ctx.set_materialize_grads(False)
        return loss, clamped

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 11
        operators, (z1, z2, scale, *state) = ctx.operators, ctx.saved_tensors
        backward = operators.directly[1] if operators.directly and holds_numbers(grad_loss) else operators.backward
        need_scale = ctx.needs_input_grad[3]
        args = (z1, z2, scale, *ctx.options, *state, grad_loss.contiguous(), need_scale)
        dz1, dz2, dscale = once_differentiable(backward, *args)
        return None, dz1, dz2, dscale if need_scale else None, *[None] * 7
