"""Small problems of the `torch` backend: the block of exponentials is kept for the backward, not computed again.

    forward   s = scale u v^T, m_i its largest negative, e_k = exp(beta_k (s - m_i)), lse_k = beta_k m_i + log sum_j e_k
    backward  w = sum_k beta_k a_k,i / (sum_j e_k,ij) e_k -> du = scale w v, dv = scale w^T u

Where only one of several blocks may be kept (two exponents, both directions), it is that of the logits, and the
backward makes the exponentials again.

Whether a problem is small is decided here, on the sizes of a call that computes: a traced graph has the operators of
row_stats.py and no guard on sizes. What is kept is at most KEPT_BYTES, above it memory stays O((N + M) D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem.pairs import Pairs
from ...problem.problem import Problem, Statistics
from ...problem.ranking import RankedStatistics, Ranking
from . import ranked_stats as torch_ranked
from .row_stats import Weights

KEPT_BYTES = 2**24  # 2048 x 2048 float32
MOST_DIAGONALS = 16


class Kept(NamedTuple):
    """Statistics, blocks of exponentials [N, M] and their sums, those of the rows before those of the columns; or the
    one block of logits and lse [K, N], [K, M] in place of sums.
    """

    stats: Statistics | RankedStatistics
    blocks: list[Tensor]
    sums: list[Tensor]


def forward(problem: Problem, *, columns: bool, means: bool, maximum: bool) -> Kept | None:
    """Row statistics of `problem` with what their gradient needs; None where one block exceeds KEPT_BYTES."""
    v, pairs, exponents = problem.columns, problem.pairs, problem.exponents
    all_fit = _fits(problem, len(exponents) * (2 if columns else 1))
    if not all_fit and (means or not _fits(problem, 1)):
        return None
    s = (problem.u * problem.scale) @ v.T
    kept, reverse, counts, col_counts = _keep_negatives(s, pairs, columns)
    if not all_fit and reverse is not kept:  # ids, lists, gates: what is no negative differs by direction
        return None
    lse, top, blocks, sums = _exponentials(kept, exponents, dim=1)
    if not all_fit:
        blocks, sums = [kept], [lse]
    aux = torch.stack([counts, top]) if maximum else counts[None]
    mean = torch.stack([e @ v for e in blocks]) / torch.stack(sums)[:, :, None] if means else s.new_empty(0)
    if not columns:
        return Kept(Statistics(lse, aux, s.new_empty(0), s.new_empty(0), mean), blocks, sums)
    col_lse, col_top, col_blocks, col_sums = _exponentials(reverse, exponents, dim=0)
    if not all_fit:
        col_blocks, col_sums = [], [col_lse]
    col_aux = torch.stack([col_counts, col_top]) if maximum else col_counts[None]
    return Kept(Statistics(lse, aux, col_lse, col_aux, mean), blocks + col_blocks, sums + col_sums)


def ranked_forward(problem: Problem, ranking: Ranking) -> Kept | None:
    """The same with exact ranks: the block holds omega e^s."""
    if not _fits(problem, 1):
        return None
    ((_, s, keep),) = torch_ranked.blocks(problem, problem.pairs.num_rows)
    count = keep.sum(1, dtype=s.dtype)
    weight = ranking.weight_of_rank(torch_ranked.ranks_of(s, keep), count.clamp(min=1)[:, None])
    terms = torch_ranked.log_terms(s, keep, weight)
    lse, _, blocks, sums = _exponentials(terms, (1.0,), dim=1)
    return Kept(RankedStatistics(lse[0], count[None], s.new_empty(0), s.new_empty(0)), blocks, sums)


def backward(
    u: Tensor,
    v: Tensor | None,
    scale: float | Tensor,
    exponents: Sequence[float],
    grad_lse: Tensor,
    grad_col_lse: Tensor | None,
    need_u: bool,
    need_v: bool,
    *kept: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """dL/du and dL/dv, None where not needed; `kept` is what `forward` made: blocks, then their sums or lse."""
    u = u.contiguous()  # products round differently over other strides
    weights = _weights_of_logits if kept[-1].dim() == 2 else _weights_of_exponentials
    weight = weights(exponents, grad_lse, grad_col_lse, *kept)
    if v is None:
        return (weight + weight.T).mm(u).mul_(scale), None
    du = weight.mm(v.contiguous()).mul_(scale) if need_u else None
    return du, weight.T.mm(u).mul_(scale) if need_v else None


def _weights_of_exponentials(
    exponents: Sequence[float], grad_lse: Tensor, grad_col_lse: Tensor | None, *kept: Tensor
) -> Tensor:
    blocks, sums = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    weight = None
    for at, (e, total) in enumerate(zip(blocks, sums, strict=True)):
        k, is_row = at % len(exponents), at < len(exponents)
        grad = grad_lse[k] if is_row or grad_col_lse is None else grad_col_lse[k]
        coefficient = grad / total if exponents[k] == 1 else grad / total * exponents[k]
        coefficient = coefficient[:, None] if is_row else coefficient
        weight = e * coefficient if weight is None else weight.addcmul_(e, coefficient)
    assert weight is not None
    return weight


def _weights_of_logits(
    exponents: Sequence[float], grad_lse: Tensor, grad_col_lse: Tensor | None, s: Tensor, lse: Tensor, *more: Tensor
) -> Tensor:
    weight = Weights(exponents, lse, grad_lse).of(slice(None), s, None)
    if grad_col_lse is not None:
        (col_lse,) = more
        weight += Weights(exponents, col_lse, grad_col_lse).of(slice(None), s.T, None).T
    return weight


def fits(numbers: int, dtype: torch.dtype) -> bool:
    """Whether blocks of so many numbers of a dtype are kept."""
    return 0 < numbers * dtype.itemsize <= KEPT_BYTES


def _fits(problem: Problem, blocks: int) -> bool:
    return fits(blocks * problem.pairs.num_rows * problem.pairs.num_columns, problem.u.dtype)


def _keep_negatives(s: Tensor, pairs: Pairs, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s with -inf outside the negatives of every row, of every column, and how many each has; s is overwritten."""
    n, m, images, offset = pairs.num_rows, pairs.num_columns, pairs.num_images, pairs.positive_offset
    is_plain = not pairs.has_ids and pairs.ignored is None and pairs.gate is None
    if is_plain and images and 2 * n <= MOST_DIAGONALS * images:
        # equal images lie on diagonals: a few vectors to fill instead of a mask
        own = s[:, offset : offset + n]
        for d in range(images - n, n, images):
            own.diagonal(d).fill_(-torch.inf)
        views = n // images
        if not columns:
            return s, s, s.new_full((n,), m - views), s
        col_counts = s.new_full((m,), n)
        col_counts[offset : offset + n] -= views
        return s, s, s.new_full((n,), m - views), col_counts
    rows, cols = slice(0, n), slice(0, m)
    keep = pairs.keep(rows, cols)
    if keep is None:
        return s, s, s.new_full((n,), m), s.new_full((m,), n)
    reverse, col_counts = s, s
    if columns:
        keep_reverse = pairs.keep_reverse(rows, cols)
        assert keep_reverse is not None
        reverse, col_counts = s.where(keep_reverse, -torch.inf), keep_reverse.sum(0, dtype=s.dtype)
    return s.masked_fill_(~keep, -torch.inf), reverse, keep.sum(1, dtype=s.dtype), col_counts


def _exponentials(s: Tensor, exponents: Sequence[float], dim: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """lse [K, .], the largest logit, exp(beta_k (s - largest)) and their sums along `dim`, 1 where there are none."""
    top = s.amax(dim)
    # nothing kept: exp(-inf - shift) = 0 and log 0 = -inf, not NaN
    shift = top.clamp(min=torch.finfo(s.dtype).min)
    below = s - shift.unsqueeze(dim)
    blocks = [below if beta == 1 else below * beta for beta in exponents]
    lses, sums = [], []
    for beta, e in zip(exponents, blocks, strict=True):
        total = e.exp_().sum(dim)
        lses.append(total.log() + (shift if beta == 1 else shift * beta))
        sums.append(total.clamp_(min=1.0))
    return torch.stack(lses), top, blocks, sums
