"""Sums over pairs of anchors and the columns of all ranks, one shard of them at a time.

    forward   sums of every shard, added up
    backward  another turn; a shard's part of the gradient needs nothing of the others

Rules and what travels are those of ring_stats.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.pair_sums import checked_sums, pair_sums
from ..operators.problem_call import ProblemCall, of_saved
from ..operators.registration import once_differentiable
from ..problem.problem import PairSums
from .ring import Ring
from .ring_stats import gradient_around, shards_around


def sums_of_all(
    u: Tensor,
    v: Tensor,
    *,
    offset: Tensor,
    sign: int = 1,
    ids: Tensor | None = None,
    ring: Ring | None = None,
    **options,
) -> PairSums:
    """`pair_sums` of rows u [N, D] over columns v [M, D] with their ids [M] and, round a ring, those of other ranks.

    Everything else is as in `pair_sums`, and of this rank. Every rank has to make the call, and its backward.
    """
    if ring is None:
        return pair_sums(u, v, offset=offset, sign=sign, col_ids=ids, **options)
    call = checked_sums(u, v, offset, sign, col_ids=ids, **options)
    return PairSums(*_RingSums.apply(ring, float(sign), offset, *call))


class _RingSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ring: Ring, sign: float, offset: Tensor, *arguments):
        call, totals = ProblemCall(*arguments), None
        for shard in shards_around(ring, call, call.col_ids):
            with torch._C._AutoDispatchBelowAutograd():
                found = torch.ops.contrastive_ext.pair_sums.default(*shard, offset, sign)
            totals = found if totals is None else tuple(map(torch.add, totals, found))
        assert totals is not None
        total, slope, number = totals
        ctx.ring, ctx.sign, ctx.numbers = ring, sign, call.numbers()
        # of the forward, not of what a backward asks for: what travels must not depend on one rank's question
        _, _, ctx.need_offset, *needs = ctx.needs_input_grad
        ctx.needs = tuple(needs[:3])
        ctx.save_for_backward(offset, slope, *call.tensors())
        ctx.mark_non_differentiable(slope, number)
        return total, slope, number

    @staticmethod
    def backward(ctx, grad_sum: Tensor, *_):
        offset, slope, *tensors = ctx.saved_tensors
        found: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs):
            found = once_differentiable(
                _gradient, ctx.ring, ctx.needs, ctx.numbers, ctx.sign, offset, grad_sum.contiguous(), *tensors
            )
        doffset = grad_sum * slope if ctx.need_offset else None
        return (None, None, doffset, *found, *[None] * (len(ctx.needs_input_grad) - 6))


def _gradient(ring: Ring, needs: tuple[bool, bool, bool], numbers: tuple, sign: float, offset, grad_sum, *tensors):
    call = of_saved(tensors, numbers)
    operator = torch.ops.contrastive_ext.pair_sums_backward.default
    return gradient_around(
        ring, call, call.col_ids, needs, lambda c, *wanted: operator(*c, offset, sign, grad_sum, *wanted)
    )
