"""Row statistics of anchors against the columns of all ranks, one shard of them at a time.

    forward   lse and counts of every shard, merged:  lse = log sum_shards e^{lse_shard}
    backward  another turn; a shard's part of the gradient needs of the others only the merged lse:
              G_ij = sum_k beta_k a_k,i exp(beta_k s_ij - lse_k,i)

The own shard is step 0, by the rules of the call; columns of other ranks show other images, so that ids and a guide,
which travel with them, are all that can cancel them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..operators.problem_call import ProblemCall, of_saved
from ..operators.registration import once_differentiable
from ..operators.row_stats import checked_call, row_stats, union
from ..problem.problem import Statistics
from .ring import Homeward, Ring


def stats_of_all(
    u: Tensor, v: Tensor | None = None, *, ids: Tensor | None = None, ring: Ring | None = None, **options
) -> Statistics:
    """`row_stats` of u over v (None: u itself) with their ids and, round a ring, over those of other ranks too."""
    if ring is None:
        return row_stats(u, v, col_ids=None if v is None else ids, **options)
    return ring_stats(ring, u, v, ids=ids, **options)


def ring_stats(
    ring: Ring, u: Tensor, v: Tensor | None = None, *, ids: Tensor | None = None, diagnostics: bool = False, **options
) -> Statistics:
    """`row_stats` of u [N, D] over the columns of all ranks, of which v [M, D] (None: u itself) are this rank's.

    ids, and the features of a gate, are those of this rank's columns. Everything else is as in `row_stats`, and of this
    rank. Every rank has to make the call, and its backward.
    Memory beyond u, v and their gradients: a foreign shard and, in the backward, what a step adds to both; where
    transfers overlap also the next shard and two gradients on their way
    """
    call = checked_call(u, v, col_ids=None if v is None else ids, **options)
    lse, aux = _RingStats.apply(ring, diagnostics, ids, *call)
    nothing = u.new_empty(0)
    return Statistics(lse, aux, nothing, nothing, nothing)


class _RingStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ring: Ring, diagnostics: bool, ids: Tensor | None, *arguments):
        call, total = ProblemCall(*arguments), None
        for shard in shards_around(ring, call, ids):
            with torch._C._AutoDispatchBelowAutograd():
                lse, aux, *_ = torch.ops.contrastive_ext.row_stats.default(*shard, False, False, diagnostics, False)
            total = (lse, aux) if total is None else union(total, (lse, aux))
        assert total is not None
        lse, aux = total
        ctx.ring, ctx.numbers = ring, call.numbers()
        # of the forward, not of what a backward asks for: what travels must not depend on one rank's question
        _, _, _, need_u, need_v, need_scale, *_ = ctx.needs_input_grad
        ctx.needs = need_u, need_u if call.v is None else need_v, need_scale
        ctx.save_for_backward(lse, ids, *call.tensors())
        ctx.mark_non_differentiable(aux)
        return lse, aux

    @staticmethod
    def backward(ctx, grad_lse: Tensor, _aux):
        lse, ids, *tensors = ctx.saved_tensors
        found = once_differentiable(
            _gradient, ctx.ring, ctx.needs, ctx.numbers, lse, grad_lse.contiguous(), ids, *tensors
        )
        return (None, None, None, *found, *[None] * (len(ctx.needs_input_grad) - 6))


def _gradient(ring: Ring, needs: tuple[bool, bool, bool], numbers: tuple, lse: Tensor, grad_lse: Tensor, ids, *tensors):
    call = of_saved(tensors, numbers)
    operator = torch.ops.contrastive_ext.row_stats_backward.default
    return gradient_around(ring, call, ids, needs, lambda c, *wanted: operator(*c, lse, grad_lse, None, None, *wanted))


def shards_around(ring: Ring | None, call: ProblemCall, ids: Tensor | None) -> Iterator[ProblemCall]:
    """The call on its own columns, then on the shard of every other rank; ids are those of its own columns."""
    own = (call.u if call.v is None else call.v, ids, call.gate_features)
    for step, (v, of_shard, features) in enumerate(iter([own]) if ring is None else ring.round(*own)):
        beside = {"col_ids": of_shard, "gate_features": features, "gate_col_limit": None}
        yield call if step == 0 else call._replace(v=v, num_images=0, positive_offset=0, ignored=None, **beside)
        del v


def gradient_around(
    ring: Ring | None,
    call: ProblemCall,
    ids: Tensor | None,
    needs: tuple[bool, bool, bool],
    operator: Callable[[ProblemCall, bool, bool], tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """du, dv (None for one set, where du holds it) and dscale of one turn.

    needs     gradients of u, v (one set: u again) and scale
    operator  (call, need_u, need_v) -> the gradient of one shard, from statistics over all of them
    """
    need_u, need_v, need_scale = needs
    one_set = call.v is None
    scale = call.scale_value if call.scale is None else call.scale
    du: Tensor | None = None
    home: Homeward | None = None
    dscale = torch.zeros_like(call.u[0, 0])
    for step, shard in enumerate(shards_around(ring, call, ids)):
        both_at_once = one_set and step == 0  # du holds what the columns get
        part, gradient = operator(shard, need_u or need_scale, need_v and not both_at_once)
        del shard
        if need_scale:
            dscale += (call.u * part).sum() / (2 * scale if both_at_once else scale)
        if need_u:
            du = part if du is None else du.add_(part)
        del part  # what is not needed any more makes room for what comes
        if home is not None:
            home.send(gradient, step)
        elif need_v:
            home = Homeward(ring, du if one_set and du is not None else gradient)
        del gradient
    arrived = None if home is None else home.arrived()
    return du, None if one_set else arrived, dscale if need_scale else None
