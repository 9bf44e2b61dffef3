"""Where a query's positive ranks among all columns: recall and mean reciprocal rank, without an N x M matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import numerics
from ..operators.row_stats import row_stats
from ..problem.pairs import Gate
from .mining import check_columns, check_positives, operands


@torch.no_grad()
def ranks_of_positives(
    queries: Tensor, columns: Tensor, positives: Tensor, *, normalize: bool = True, backend: str = "auto"
) -> Tensor:
    """[N] int64, 1 + how many columns are more similar to a query than its positive; ties count for the query.

    queries, columns  [N, E] and [M, E] fp16/bf16/fp32/fp64
    positives         [N] int64, the column that is each query's positive
    normalize         score by cosine; False: by inner product
    Raises            ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run
    Cost              4 N M E flops, O((N + M) E) memory; a column counts as more similar beyond the rounding of scores
    """
    check_columns(queries, columns)
    check_positives(positives, queries, columns)
    u, v = operands(queries, columns, normalize)
    if not u.shape[0]:
        return positives.clone()
    limit = (u * v[positives]).sum(1) + numerics.rounding_of_logits(1.0, u, v[positives])
    # a gate cancels what scores above the limit, and the sweep counts what is left
    left = row_stats(u, v, scale=1.0, gate=Gate(u[None], v, limit), backend=backend).aux[0]
    return v.shape[0] - left.long() + 1


def recall_at_k(
    queries: Tensor,
    columns: Tensor,
    positives: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    normalize: bool = True,
    backend: str = "auto",
) -> dict[int, float]:
    """Share of the queries whose positive is among the k most similar columns, for every k.

    Arguments, errors and cost as in `ranks_of_positives`; N >= 1. Waits for the device.
    """
    if not ks or not all(isinstance(k, int) and k >= 1 for k in ks):
        raise ValueError(f"ks must be integers >= 1; got {ks!r}.")
    ranks = _some(ranks_of_positives(queries, columns, positives, normalize=normalize, backend=backend))
    return {k: (ranks <= k).double().mean().item() for k in ks}


def mean_reciprocal_rank(
    queries: Tensor, columns: Tensor, positives: Tensor, *, normalize: bool = True, backend: str = "auto"
) -> float:
    """Mean over the queries of 1/rank of the positive.

    Arguments, errors and cost as in `ranks_of_positives`; N >= 1. Waits for the device.
    """
    ranks = _some(ranks_of_positives(queries, columns, positives, normalize=normalize, backend=backend))
    return ranks.double().reciprocal().mean().item()


def _some(ranks: Tensor) -> Tensor:
    if not ranks.shape[0]:
        raise ValueError("an average over queries needs at least one of them.")
    return ranks
