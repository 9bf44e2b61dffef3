"""Hard negatives: the most similar columns of every query that are not known to be positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..checks import can_read, check_number, check_tensor, describe
from ..operators import top_columns as operator
from ..operators.top_columns import TopColumns
from ..problem.pairs import NO_COLUMN, integers


@torch.no_grad()
def top_columns(
    queries: Tensor,
    columns: Tensor,
    k: int,
    *,
    skip: int = 0,
    ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    positives: Tensor | None = None,
    margin: float | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> TopColumns:
    """The k most similar columns of every query, best first, without an N x M matrix: mines hard negatives.

    queries     [N, E] fp16/bf16/fp32/fp64
    columns     [M, E] same dtype
    k           >= 1, how many
    skip        leave out so many of the best first: those nearest to a query are often positives nobody has labelled
    ids, column_ids  [N] and [M] integers > -2^63 + 2: columns of the query's own id are no candidates
    positives   [N] int64, the column that is each query's positive, and no candidate of it
    margin      with `positives`: only columns whose score is below the positive's by more than this, and by more than
                rounding: at 0 no duplicate of the positive
    normalize   score by cosine; False: by inner product
    Returns     `TopColumns`: scores [N, k], and columns [N, k] int64, of equal scores the lower column first; -inf and
                -1 where a query has fewer candidates. A NaN score is never among the best. No gradient
    Raises      ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Cost        2 N M E flops, O((N + M) E + N (k + skip)) memory; scores in float32 (float64), of 16-bit rows exact
    """
    check_columns(queries, columns)
    if not isinstance(k, int) or not isinstance(skip, int) or k < 1 or skip < 0:
        raise ValueError(f"k must be an integer >= 1 and skip one >= 0; got k={k!r}, skip={skip!r}.")
    if (ids is None) != (column_ids is None):
        raise ValueError("ids and column_ids are compared with each other: give both or none.")
    if margin is not None:
        check_number("margin", margin)
        if positives is None:
            raise ValueError("margin is measured from the score of the positive: give positives too.")
    u, v = operands(queries, columns, normalize)
    row_ids = col_ids = below = None
    if ids is not None and column_ids is not None:
        row_ids = integers("ids", ids, queries.shape[0], queries.device)
        col_ids = integers("column_ids", column_ids, columns.shape[0], queries.device)
    if positives is not None:
        check_positives(positives, queries, columns)
        if margin is not None:
            rounding = numerics.rounding_of_logits(1.0, u, v[positives])
            below = (u * v[positives]).sum(1) - margin - rounding
    found = operator.top_columns(
        u[None], v, k + skip, col_ids=col_ids, row_ids=row_ids, excluded=positives, below=below, backend=backend
    )
    return TopColumns(found.scores[:, skip:], found.columns[:, skip:])


def operands(queries: Tensor, columns: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Both in the statistics dtype, with `normalize` unit rows."""
    dtype = numerics.stats_dtype(queries.dtype)
    u, v = (x.detach().to(dtype) for x in (queries, columns))
    return (numerics.normalize(u), numerics.normalize(v)) if normalize else (u, v)


def check_columns(queries: Tensor, columns: Tensor) -> None:
    """ValueError or TypeError unless they are rows of one width, dtype and device."""
    for name, x in (("queries", queries), ("columns", columns)):
        check_tensor(name, x)
        if x.dtype not in numerics.SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}.")
    same = queries.dtype == columns.dtype and queries.device == columns.device
    if queries.dim() != 2 or columns.dim() != 2 or queries.shape[1] != columns.shape[1] or not same:
        raise ValueError(
            "queries must be [N, E] and columns [M, E], of one dtype and device; "
            f"got {describe(queries)} and {describe(columns)}."
        )


def check_positives(positives: Tensor, queries: Tensor, columns: Tensor) -> None:
    """ValueError unless they name a column for every query; their range where looking costs no wait."""
    check_tensor("positives", positives)
    n, m = queries.shape[0], columns.shape[0]
    if positives.dtype != torch.int64 or positives.shape != (n,) or positives.device != queries.device:
        raise ValueError(f"positives must be int64 [{n}] on {queries.device}; got {describe(positives)}.")
    if can_read(positives) and n and not bool(((positives > NO_COLUMN) & (positives < m)).all()):
        raise ValueError(f"positives name columns, 0 to {m - 1}; got {positives.min()} to {positives.max()}.")
