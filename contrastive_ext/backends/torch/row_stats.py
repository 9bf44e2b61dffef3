"""The `torch` backend: tiles of the similarity matrix in plain PyTorch. Any device, any dtype.

    forward   s = scale u v^T, tile by tile -> online log-sum-exp of rows (and columns, from the same tile)
    backward  s again -> w_ij = sum_k beta_k a_k,i exp(beta_k s_ij - lse_k,i) over negatives
              -> du = scale w v, dv = scale w^T u

With one set the matrix is symmetric: only the tiles on and above the diagonal are visited, each serves i -> j and
j -> i. Tiles are visited in a fixed order, so results repeat bit for bit. Memory: O((N + M) D) plus a few tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...problem.pairs import NO_COLUMN, UNFILLED, Candidates
from ...problem.problem import Problem, Statistics, Upstream
from ..backend import lacks_products

# CPU: 1024 x 1024 fp32 is 4 MiB, two of them stay in a shared L3. GPU: larger ones amortise launches (a few of 36 MiB).
TILE = {"cpu": 1024}
TILE_ELSEWHERE = 3072


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> str | None:
    """None: plain PyTorch runs everywhere, but knows no products of split operands."""
    return lacks_products(operand_dtype)


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`."""
    u, v, pairs = problem.u * problem.scale, problem.columns, problem.pairs
    rows = _OnlineLse(u, pairs.num_rows, problem.exponents, diagnostics, means)
    cols = rows
    if columns:
        cols = _OnlineLse(u, pairs.num_columns, problem.exponents, diagnostics)
    both_sides = problem.one_set or columns
    for i, j in _tiles(problem):
        s = u[i] @ v[j].T
        rows.add(i, s, pairs.keep(i, j), v[j])
        if both_sides and not (problem.one_set and i == j):  # a diagonal tile holds both directions already
            reverse = pairs.keep_reverse(i, j)
            cols.add(j, s.T, reverse if reverse is None else reverse.T, u[i])
    col_lse, col_aux = cols.result(maximum) if columns else (u.new_empty(0), u.new_empty(0))
    return Statistics(*rows.result(maximum), col_lse, col_aux, rows.normalized_mean() if means else u.new_empty(0))


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    u, v, pairs = problem.u * problem.scale, problem.columns, problem.pairs
    row_weight = Weights(problem.exponents, upstream.lse, upstream.grad_lse)
    col_weight = row_weight if problem.one_set else None
    if upstream.col_lse is not None and upstream.grad_col_lse is not None:
        col_weight = Weights(problem.exponents, upstream.col_lse, upstream.grad_col_lse)
    need_dv = upstream.need_v and not problem.one_set
    du = torch.zeros_like(u) if upstream.need_u else None
    dv = torch.zeros_like(v) if need_dv else None
    for i, j in _tiles(problem):
        s = u[i] @ v[j].T
        w = row_weight.of(i, s, pairs.keep(i, j))
        if col_weight is not None:
            reverse = pairs.keep_reverse(i, j)
            w += col_weight.of(j, s.T, reverse if reverse is None else reverse.T).T
        if du is not None:
            du[i].addmm_(w, v[j])
            if problem.one_set and i != j:
                du[j].addmm_(w.T, problem.u[i])
        if dv is not None:
            dv[j].addmm_(w.T, u[i])  # u carries the scale already
    return u.new_empty(0) if du is None else du.mul_(problem.scale), u.new_empty(0) if dv is None else dv


def top_columns(scorers: Tensor, features: Tensor | None, k: int, which: Candidates) -> tuple[Tensor, Tensor]:
    """Scores and columns [G, k] of the k best columns of every image; see operators/top_columns.py."""
    features = scorers.flatten(0, 1) if features is None else features
    groups, device = scorers.shape[1], scorers.device
    best = scorers.new_full((groups, k), -torch.inf)
    columns = torch.full((groups, k), NO_COLUMN, device=device)
    size = TILE.get(device.type, TILE_ELSEWHERE)
    for g in (slice(i, min(i + size, groups)) for i in range(0, groups, size)):
        for j0 in range(0, len(features), size):
            j = torch.arange(j0, min(j0 + size, len(features)), device=device)
            scores = (scorers[:, g] @ features[j0 : j0 + size].T).amax(0)
            ignored = scores.isnan()
            if which.num_images:
                ignored |= j % which.num_images == torch.arange(g.start, g.stop, device=device)[:, None]
            if which.col_ids is not None:
                ignored |= which.col_ids[j] == UNFILLED
                if which.row_ids is not None:
                    ignored |= which.col_ids[j] == which.row_ids[g, None]
            if which.excluded is not None:
                ignored |= j == which.excluded[g, None]
            if which.below is not None:
                ignored |= ~(scores < which.below[g, None])
            candidates = torch.cat([best[g], scores.masked_fill(ignored, -torch.inf)], 1)
            at = _first_largest(candidates, k)
            numbers = torch.cat([columns[g], j.expand(len(scores), -1)], 1).gather(1, at)
            best[g] = candidates.gather(1, at)
            columns[g] = numbers.masked_fill(best[g] == -torch.inf, NO_COLUMN)
    return best, columns


def _first_largest(x: Tensor, k: int) -> Tensor:
    """Positions [R, k] of the k largest of every row of x, descending; of equals the first."""
    largest = x.topk(k)
    at = largest.indices.sort(1).values
    kth = largest.values[:, -1:]
    # topk takes any of several equal to the k-th
    ambiguous = ((x >= kth).sum(1) > k) & (kth[:, 0] > -torch.inf)
    if x.device.type != "cpu" or ambiguous.any():  # looking costs a wait for the device: there always
        firsts = x.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
        at = torch.where(ambiguous[:, None], firsts, at)
    order = x.gather(1, at).sort(dim=1, descending=True, stable=True).indices
    return at.gather(1, order)


def _tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of every tile; with one set only those on and above the diagonal."""
    size = TILE.get(problem.u.device.type, TILE_ELSEWHERE)
    for i in range(0, problem.pairs.num_rows, size):
        for j in range(i if problem.one_set else 0, problem.pairs.num_columns, size):
            yield (
                slice(i, min(i + size, problem.pairs.num_rows)),
                slice(j, min(j + size, problem.pairs.num_columns)),
            )


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """[K, 1] with these numbers, filled in on the device: a copy from the host would wait for it."""
    return torch.stack([like.new_full((1,), x) for x in numbers])


class _OnlineLse:
    """Running maximum and sums of exp(beta_k s - beta_k max) for each of n anchors, fed tile by tile."""

    def __init__(self, like: Tensor, n: int, exponents: tuple[float, ...], diagnostics: bool, means: bool = False):
        self.exponents = (*exponents, 2 * exponents[0]) if diagnostics else exponents
        self.max = like.new_full((n,), -torch.inf)  # one maximum serves every exponent: all are positive
        self.sums = like.new_zeros(len(self.exponents), n)
        self.count = like.new_zeros(n)
        self.total = like.new_zeros(n) if diagnostics else None  # sum of the logits themselves
        self.mean = like.new_zeros(len(exponents) if means else 0, n, like.shape[1])

    def add(self, anchors: slice, s: Tensor, keep: Tensor | None, values: Tensor) -> None:
        """Take in logits s [anchors, candidates]; candidates outside `keep` are ignored."""
        if self.total is not None:
            self.total[anchors] += s.sum(1) if keep is None else s.where(keep, 0.0).sum(1)
        self.count[anchors] += s.shape[1] if keep is None else keep.sum(1)
        if keep is not None:
            s = s.where(keep, -torch.inf)
        old = self.max[anchors]
        new = torch.maximum(old, s.amax(1))
        shift = new.masked_fill(new == -torch.inf, 0.0)  # nothing kept so far: exp(-inf - 0) = 0, not NaN
        for k, beta in enumerate(self.exponents):
            rescale = ((old - shift) * beta).exp_()
            e = (s - shift[:, None]).mul_(beta).exp_()
            self.sums[k, anchors] = self.sums[k, anchors] * rescale + e.sum(1)
            if k < len(self.mean):
                self.mean[k, anchors] = torch.addmm(self.mean[k, anchors] * rescale[:, None], e, values)
        self.max[anchors] = new  # last: `old` is a view of it

    def result(self, maximum: bool) -> tuple[Tensor, Tensor]:
        betas = _column(self.max, self.exponents)
        lse = self.max * betas + self.sums.log()
        if self.total is None:
            return lse, torch.stack([self.count, self.max] if maximum else [self.count])
        return lse[:-1].clone(), torch.stack([self.count, self.max, self.total, lse[-1]])

    def normalized_mean(self) -> Tensor:
        sums = self.sums[: len(self.mean), :, None]
        return self.mean / sums.masked_fill(sums == 0, 1.0)


class Weights:
    """w = sum_k beta_k a_k exp(beta_k s - lse_k): what the gradient gives every negative of an anchor."""

    def __init__(self, exponents: Sequence[float], lse: Tensor, grad_lse: Tensor):
        self.exponents = exponents
        # an anchor without negatives: exp(s - inf) = 0, not NaN
        self.lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        self.coefficient = grad_lse * _column(grad_lse, exponents)

    def of(self, anchors: slice, s: Tensor, keep: Tensor | None) -> Tensor:
        """Weights [anchors, candidates] of logits s; 0 outside `keep`."""
        w = self._term(0, anchors, s)
        for k in range(1, len(self.exponents)):
            w += self._term(k, anchors, s)
        return w if keep is None else w.where(keep, 0.0)

    def _term(self, k: int, anchors: slice, s: Tensor) -> Tensor:
        e = (s * self.exponents[k]).sub_(self.lse[k, anchors, None]).exp_()
        return e.mul_(self.coefficient[k, anchors, None])
