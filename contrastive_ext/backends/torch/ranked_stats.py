"""Ranked statistics of the `torch` backend: blocks of whole rows in plain PyTorch, any device, any dtype.

    forward   s = scale u v^T for a block of rows -> ranks within every row -> weights omega -> log sum omega e^s
    backward  s and omega again -> w_ij = a_i omega_ij e^{s_ij - lse_i} -> du = scale w v, dv = scale w^T u

Ranks span a row, so a block holds all its columns. Exact ranks sort each row of the block with the library's sort;
histograms look the bin up. The `triton` backend takes the exact path from here: a library sort is what it would call.
Memory: O((N + M) D) plus a few blocks of BLOCK_ELEMENTS logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem.problem import Problem
from ...problem.ranking import RankedStatistics, Ranking, histogram_axis

# Logits of a block, sorted as (float32, int64) pairs: 2^18 take 5 MiB on the CPU, and as long as 2^19.
BLOCK_ELEMENTS = {"cpu": 2**18}
BLOCK_ELEMENTS_ELSEWHERE = 2**24


def ranked_forward(problem: Problem, ranking: Ranking, *, diagnostics: bool) -> RankedStatistics:
    """Ranked statistics of `problem`; see `RankedStatistics`."""
    u, n = problem.u, problem.pairs.num_rows
    if not problem.pairs.num_columns:
        return _nothing(u, ranking, diagnostics)
    lse, aux = u.new_empty(n), u.new_empty(6 if diagnostics else 1, n)
    axis = u.new_empty(3, n) if ranking.bins else u.new_empty(0)
    below = u.new_empty(n, ranking.bins + 1) if ranking.bins else u.new_empty(0)
    for rows, s, keep in blocks(problem):
        count = keep.sum(1).to(s.dtype)
        if ranking.bins:
            axis[:, rows], below[rows] = _count_bins(s, keep, count, ranking.bins)
        table = _Table.of(rows, axis, below)
        lse[rows], aux[:, rows] = _sums(ranking.of_rows(rows), s, keep, count, table, diagnostics)
    return RankedStatistics(lse, aux, axis, below)


def _sums(
    ranking: Ranking, s: Tensor, keep: Tensor, count: Tensor, table: _Table | None, diagnostics: bool
) -> tuple[Tensor, Tensor]:
    """lse and aux of a block of rows."""
    weight = _weight(ranking, s, keep, count, table)
    terms = log_terms(s, keep, weight)
    lse = terms.logsumexp(1)
    if not diagnostics:
        return lse, count[None]
    kept = weight.where(keep, 0.0)
    largest, total = s.where(keep, -torch.inf).amax(1), s.where(keep, 0.0).sum(1)
    return lse, torch.stack([count, largest, total, (2 * terms).logsumexp(1), kept.sum(1), kept.amax(1)])


def histogram_range(problem: Problem) -> Tensor:
    """[3, N] lowest and highest logit of every row's negatives and their number: the first of three passes."""
    found = problem.u.new_empty(3, problem.pairs.num_rows)
    for rows, s, keep in blocks(problem):
        found[:, rows] = torch.stack([*_range(s, keep), keep.sum(1).to(s.dtype)])
    return found


def histogram_counts(problem: Problem, axis: Tensor, bins: int) -> Tensor:
    """[N, bins] int32, how many of the row's negatives lie in each bin of an axis over all its columns."""
    counts = torch.zeros(problem.pairs.num_rows, bins, dtype=torch.int32, device=problem.u.device)
    for rows, s, keep in blocks(problem):
        counts[rows] = _counts(s, keep, axis[:, rows], bins)
    return counts


def histogram_sums(
    problem: Problem, ranking: Ranking, axis: Tensor, below: Tensor, diagnostics: bool
) -> tuple[Tensor, Tensor]:
    """lse and aux over these columns, by histograms over all columns of the rows."""
    n = problem.pairs.num_rows
    lse, aux = problem.u.new_empty(n), problem.u.new_empty(6 if diagnostics else 1, n)
    for rows, s, keep in blocks(problem):
        table = _Table(axis[:, rows], below[rows])
        lse[rows], aux[:, rows] = _sums(ranking.of_rows(rows), s, keep, keep.sum(1).to(s.dtype), table, diagnostics)
    return lse, aux


def below_of(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, bins + 1] how many negatives lie in lower bins."""
    below = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=dtype, device=counts.device)
    below[:, 1:] = counts.cumsum(1)
    return below


def ranked_backward(
    problem: Problem, ranking: Ranking, stats: RankedStatistics, grad_lse: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    u, v = problem.u * problem.scale, problem.columns
    du = torch.empty_like(u) if need_u else None
    dv = torch.zeros_like(v) if need_v or (need_u and problem.one_set) else None
    # a row without negatives: exp(s - inf) = 0, not NaN
    lse = stats.lse.masked_fill(stats.lse == -torch.inf, torch.inf)
    for rows, s, keep in blocks(problem):
        weight = _weight(ranking.of_rows(rows), s, keep, stats.aux[0, rows], _Table.of(rows, stats.axis, stats.below))
        # the weight within the exponent: e^s alone overflows where a weight of 0 takes the largest logit out of lse
        w = (s + weight.log() - lse[rows, None]).exp_().mul_(grad_lse[rows, None]).where(keep, 0.0)
        if du is not None:
            torch.mm(w, v, out=du[rows])
        if dv is not None:
            dv.addmm_(w.T, u[rows])  # u carries the scale already
    if du is not None:
        du.mul_(problem.scale)
    if problem.one_set and du is not None and dv is not None:
        du, dv = du.add_(dv), None
    nothing = u.new_empty(0)
    return nothing if du is None else du, nothing.clone() if dv is None else dv


def ranks_of(s: Tensor, keep: Tensor) -> Tensor:
    """[rows, columns] rank of every kept logit in its row, 1 for the lowest, the largest of equal ones; others <= 0."""
    ordered, index = s.where(keep, -torch.inf).sort(1)  # ignored pairs come first, NaN last
    columns = s.shape[1]
    place = torch.arange(1, columns + 1, device=s.device).expand_as(index)
    ends = torch.ones_like(keep)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    # the place of the end of every run of equal logits: the nearest end to the right
    last = place.where(ends, columns).flip(1).cummin(1).values.flip(1)
    ranks = torch.empty_like(index).scatter_(1, index, last - (columns - keep.sum(1, keepdim=True)))
    return ranks.where(keep, 0)


def blocks(problem: Problem, height: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row slice, logits and mask of negatives of every block of whole rows, `height` of them or as many as pay."""
    u, v, pairs = problem.u * problem.scale, problem.columns, problem.pairs
    elements = BLOCK_ELEMENTS.get(u.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    height = height or max(1, elements // max(1, pairs.num_columns))
    for i in range(0, pairs.num_rows, height):
        rows, columns = slice(i, min(i + height, pairs.num_rows)), slice(0, pairs.num_columns)
        s = u[rows] @ v.T
        keep = pairs.keep(rows, columns)
        yield rows, s, torch.ones_like(s, dtype=torch.bool) if keep is None else keep


class _Table(NamedTuple):
    """Histograms of a block of rows."""

    axis: Tensor
    below: Tensor

    @staticmethod
    def of(rows: slice, axis: Tensor, below: Tensor) -> _Table | None:
        return _Table(axis[:, rows], below[rows]) if axis.numel() else None


def _weight(ranking: Ranking, s: Tensor, keep: Tensor, count: Tensor, table: _Table | None) -> Tensor:
    """[rows, columns] omega, finite everywhere and meaningless outside `keep`."""
    if table is None:
        return ranking.weight_of_rank(ranks_of(s, keep).to(s.dtype), count.clamp(min=1)[:, None])
    bin_of, place = _bin(s, table.axis, ranking.bins)
    start = table.below.gather(1, bin_of)
    inside = table.below.gather(1, bin_of + 1) - start
    count = table.axis[2, :, None]
    rank = start + place * (inside - 1) + 1
    return ranking.weight_of_rank(rank.clamp(min=0).minimum(count), count)


def _bin(s: Tensor, axis: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bin of every logit and its place in it, from 0 to 1; a NaN goes to bin 0."""
    position = ((s - axis[0, :, None]) * axis[1, :, None]).clamp(0, bins).nan_to_num(nan=0.0)
    bin_of = position.long().clamp(max=bins - 1)
    return bin_of, position - bin_of


def _count_bins(s: Tensor, keep: Tensor, count: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    axis = histogram_axis(*_range(s, keep), count, bins)
    return axis, below_of(_counts(s, keep, axis, bins), s.dtype)


def _range(s: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return s.where(keep, torch.inf).amin(1), s.where(keep, -torch.inf).amax(1)


def _counts(s: Tensor, keep: Tensor, axis: Tensor, bins: int) -> Tensor:
    counts = torch.zeros(len(s), bins, dtype=torch.int32, device=s.device)
    return counts.scatter_add_(1, _bin(s, axis, bins)[0], keep.int())  # integers: any order gives the same


def _nothing(u: Tensor, ranking: Ranking, diagnostics: bool) -> RankedStatistics:
    """Statistics of rows without any column."""
    n, bins = len(u), ranking.bins
    aux = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf, 0.0, 0.0]]).to(u).T.repeat(1, n)
    axis, below = (u.new_zeros(3, n), u.new_zeros(n, bins + 1)) if bins else (u.new_empty(0), u.new_empty(0))
    return RankedStatistics(u.new_full((n,), -torch.inf), aux if diagnostics else aux[:1].clone(), axis, below)


def log_terms(s: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    """log(omega e^s) [rows, columns] of logits s and weights omega; -inf outside `keep` and where omega is 0."""
    return (s + weight.log()).where(keep, -torch.inf)
