"""The k most similar columns of every image, without the matrix: how false negatives are detected.

    score_gj = max_s <scorers_gs, features_j>     over the columns j that do not show image g

A sweep like the row statistics', with a running list in place of a running sum. Lists are constants: no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..checks import describe
from ..problem.pairs import NO_COLUMN, Candidates
from .registration import register


class TopColumns(NamedTuple):
    """Per image the k best columns, best first, the lower column first among equals.

    scores   [G, k]  -inf where an image has fewer candidates
    columns  [G, k] int64, NO_COLUMN there
    """

    scores: Tensor
    columns: Tensor


@torch.no_grad()
def top_columns(
    scorers: Tensor,
    features: Tensor | None,
    k: int,
    *,
    num_images: int = 0,
    col_ids: Tensor | None = None,
    row_ids: Tensor | None = None,
    excluded: Tensor | None = None,
    below: Tensor | None = None,
    backend: str = "auto",
) -> TopColumns:
    """The k columns most similar to any scorer of an image.

    scorers     [S, G, E] float32 or float64, S views of each of G images
    features    [M, E] same dtype, of the columns; None: the scorers' own rows, one set, column s G + g is scorers[s, g]
    k           >= 1, how many
    num_images, col_ids, row_ids, excluded, below
                which columns are candidates, see `problem.pairs.Candidates`
    Returns     `TopColumns`; a NaN score is never among the best
    Cost        2 S G M E flops, O(G k) memory; on `cpu` for one set half of them, O(S G k) memory
    """
    columns = scorers.flatten(0, -2) if features is None else features
    if scorers.dim() != 3 or columns.dim() != 2 or scorers.shape[2] != columns.shape[1]:
        raise ValueError(
            f"scorers must be [S, G, E] and features [M, E]; got {list(scorers.shape)} and {list(columns.shape)}."
        )
    if scorers.dtype not in (torch.float32, torch.float64) or columns.dtype != scorers.dtype:
        raise TypeError(
            f"scorers and features must both be float32 or float64; got {scorers.dtype} and {columns.dtype}."
        )
    if k < 1 or num_images not in (0, scorers.shape[1]):
        raise ValueError(f"need k >= 1 and num_images 0 or {scorers.shape[1]}; got {k=}, {num_images=}.")
    groups = scorers.shape[1]
    for name, x, dtype, length in (
        ("col_ids", col_ids, torch.int64, columns.shape[0]), ("row_ids", row_ids, torch.int64, groups),
        ("excluded", excluded, torch.int64, groups), ("below", below, scorers.dtype, groups),
    ):  # fmt: skip
        if x is not None and (x.dtype != dtype or x.shape != (length,) or x.device != scorers.device):
            raise ValueError(f"{name} must be {dtype} [{length}] on {scorers.device}; got {describe(x)}.")
    rules = num_images, col_ids, row_ids, excluded, below
    return TopColumns(*torch.ops.contrastive_ext.top_columns(scorers, features, k, *rules, backend))


def merge(one: TopColumns, other: TopColumns, columns_before: int) -> TopColumns:
    """The best of two sets of columns; the other set's columns are numbered from `columns_before` on."""
    k = one.scores.shape[1]
    moved = torch.where(other.columns == NO_COLUMN, NO_COLUMN, other.columns + columns_before)
    scores, columns = torch.cat([one.scores, other.scores], 1), torch.cat([one.columns, moved], 1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # equals: the first set's are lower
    return TopColumns(scores.gather(1, order), columns.gather(1, order))


def _top_columns(scorers, features, k, num_images, *rules_and_backend) -> tuple[Tensor, Tensor]:
    *rules, backend = rules_and_backend
    chosen = dispatch.select(backend, scorers.device, scorers.dtype, scorers.dtype, scorers.shape[2])
    scorers, features = (None if x is None else x.detach().contiguous() for x in (scorers, features))
    which = Candidates(num_images, *(None if x is None else x.contiguous() for x in rules))
    return chosen.top_columns(scorers, features, k, which)


def _shapes(scorers, features, k, *_) -> tuple[Tensor, Tensor]:
    groups = scorers.shape[1]
    return scorers.new_empty(groups, k), scorers.new_empty(groups, k, dtype=torch.int64)


register(
    "top_columns",
    "(Tensor scorers, Tensor? features, int k, SymInt num_images, Tensor? col_ids, Tensor? row_ids, Tensor? excluded, "
    "Tensor? below, str backend) -> (Tensor scores, Tensor columns)",
    _top_columns,
    _shapes,
)
