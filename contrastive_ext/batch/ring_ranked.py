"""Ranked statistics, by histograms, against columns of all ranks: three turns of the ring forward, one backward.

    range    lowest and highest logit of every row's negatives over all shards, their number -> the axis of its bins
    counts   negatives in every bin, added up over the shards -> how many lie below
    sums     lse of omega(rank) e^s over every shard, merged; the gradient is that of row_stats with omega looked up

Ranks do not merge, so that all sets of an anchor's columns make the turns together, those that stay on their rank (a
queue) too. The three passes are those of the `torch` backend on every device; the gradient is the backend's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.torch import ranked_stats as passes
from ..numerics import logsumexp_pair
from ..operators.problem_call import ProblemCall, of_saved
from ..operators.ranked_stats import backend_of, ranking_arguments
from ..operators.registration import once_differentiable
from ..operators.row_stats import checked_call
from ..problem.problem import Problem
from ..problem.ranking import Ranking, histogram_axis
from .ring import Ring
from .ring_stats import gradient_around, shards_around


class RankedColumns(NamedTuple):
    """One set of columns: v [M, D] or None for the rows, ids of all of them, on a ring or not, pair rules."""

    ring: Ring | None
    v: Tensor | None
    ids: Tensor | None
    rules: dict[str, Any]


def ring_ranked_stats(
    u: Tensor, sets: list[RankedColumns], *, ranking: Ranking, diagnostics: bool, backend: str, **options
) -> tuple[Tensor, Tensor]:
    """lse [N] and aux of rows u [N, D] over the negatives of all sets and ranks, as in `ranked_stats`.

    ranking   with bins
    options   what all sets share
    """
    parts, tensors = [], []
    options["backend"] = backend_of(ranking, backend, u)
    for ring, v, ids, rules in sets:
        call = checked_call(u, v, col_ids=None if v is None else ids, **rules, **options)
        parts.append(_Part(ring, call.numbers()))
        tensors += [ids, *call.tensors()]
    return _RingRanked.apply(parts, ranking, diagnostics, *tensors)


class _Part(NamedTuple):
    ring: Ring | None
    numbers: tuple


def _calls(parts: list[_Part], tensors: tuple) -> list[tuple[Ring | None, ProblemCall, Tensor | None]]:
    """Rings, calls and ids of all columns from the tensors of all parts, one after the other."""
    each = len(tensors) // len(parts)
    found = []
    for at, (ring, numbers) in enumerate(parts):
        ids, *rest = tensors[at * each : (at + 1) * each]
        found.append((ring, of_saved(rest, numbers), ids))
    return found


class _RingRanked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: list[_Part], ranking: Ranking, diagnostics: bool, *tensors):
        calls = _calls(parts, tensors)

        def turn(make: Callable[[Problem], Any]) -> Iterator[Any]:
            for ring, call, ids in calls:
                for shard in shards_around(ring, call, ids):
                    yield make(shard.problem()[0])

        lowest, highest, count = reduce(_wider, turn(passes.histogram_range))
        axis = histogram_axis(lowest, highest, count, ranking.bins)
        counts = reduce(torch.add, turn(lambda problem: passes.histogram_counts(problem, axis, ranking.bins)))
        below = passes.below_of(counts, axis.dtype)
        sums = turn(lambda problem: passes.histogram_sums(problem, ranking, axis, below, diagnostics))
        lse, aux = reduce(_union, sums)
        ctx.parts, ctx.ranking = parts, ranking
        ctx.needs = ctx.needs_input_grad[3:]  # of the forward, as in ring_stats.py
        ctx.save_for_backward(lse, aux, axis, below, *tensors)
        ctx.mark_non_differentiable(aux)
        return lse, aux

    @staticmethod
    def backward(ctx, grad_lse: Tensor, _aux):
        found = once_differentiable(
            _gradient, ctx.parts, ctx.ranking, ctx.needs, grad_lse.contiguous(), *ctx.saved_tensors
        )
        return (None, None, None, *found)


def _gradient(parts, ranking: Ranking, needs, grad_lse: Tensor, *saved) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors of all parts."""
    stats, tensors = saved[:4], saved[4:]
    operator, how = torch.ops.contrastive_ext.ranked_stats_backward.default, ranking_arguments(ranking)
    each, found = len(tensors) // len(parts), []
    for at, (ring, call, ids) in enumerate(_calls(parts, tensors)):
        _, need_u, need_v, need_scale, *_ = needs[at * each :]
        wanted = need_u, need_u if call.v is None else need_v, need_scale
        gradients = gradient_around(
            ring, call, ids, wanted, lambda c, *asked: operator(*c, *how, *stats, grad_lse, *asked)
        )
        found += [None, *gradients, *[None] * (each - 4)]
    return tuple(found)


def _wider(one: Tensor, other: Tensor) -> Tensor:
    lowest, highest = torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])
    return torch.stack([lowest, highest, one[2] + other[2]])


def _union(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """lse and aux over two disjoint sets of columns."""
    (lse, aux), (more, more_aux) = one, other
    merged = aux + more_aux
    if len(aux) > 1:
        count, _, total, _, weights, _ = merged
        largest, heaviest = torch.maximum(aux[1], more_aux[1]), torch.maximum(aux[5], more_aux[5])
        merged = torch.stack([count, largest, total, logsumexp_pair(aux[3], more_aux[3]), weights, heaviest])
    return logsumexp_pair(lse, more), merged
