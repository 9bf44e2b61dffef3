"""The k most similar columns of every image, without the matrix: how false negatives are detected.

    score_gj = max_s <scorers_gs, features_j>     over the columns j that do not show image g

A sweep like the row statistics', with a running list in place of a running sum. Lists are constants: no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..problem.pairs import NO_COLUMN
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
    features: Tensor,
    k: int,
    *,
    num_images: int = 0,
    col_ids: Tensor | None = None,
    backend: str = "auto",
) -> TopColumns:
    """The k columns most similar to any scorer of an image.

    scorers     [S, G, E] float32 or float64, S views of each of G images
    features    [M, E] same dtype, of the columns
    k           >= 1, how many
    num_images  0, or G: column j shows image j mod G, and is no candidate of it
    col_ids     [M] int64 or None: columns whose id is pairs.UNFILLED are nobody's candidates
    Returns     `TopColumns`; a NaN score is never among the best
    Cost        2 S G M E flops, O(G k) memory
    """
    if scorers.dim() != 3 or features.dim() != 2 or scorers.shape[2] != features.shape[1]:
        raise ValueError(
            f"scorers must be [S, G, E] and features [M, E]; got {list(scorers.shape)} and {list(features.shape)}."
        )
    if scorers.dtype not in (torch.float32, torch.float64) or features.dtype != scorers.dtype:
        raise TypeError(
            f"scorers and features must both be float32 or float64; got {scorers.dtype} and {features.dtype}."
        )
    if k < 1 or num_images not in (0, scorers.shape[1]):
        raise ValueError(f"need k >= 1 and num_images 0 or {scorers.shape[1]}; got {k=}, {num_images=}.")
    if col_ids is not None and (col_ids.dtype != torch.int64 or col_ids.shape != features.shape[:1]):
        raise ValueError(f"col_ids must be int64 [{len(features)}]; got {col_ids.dtype} {list(col_ids.shape)}.")
    return TopColumns(*torch.ops.contrastive_ext.top_columns(scorers, features, k, num_images, col_ids, backend))


def merge(one: TopColumns, other: TopColumns, columns_before: int) -> TopColumns:
    """The best of two sets of columns; the other set's columns are numbered from `columns_before` on."""
    k = one.scores.shape[1]
    moved = torch.where(other.columns == NO_COLUMN, NO_COLUMN, other.columns + columns_before)
    scores, columns = torch.cat([one.scores, other.scores], 1), torch.cat([one.columns, moved], 1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # equals: the first set's are lower
    return TopColumns(scores.gather(1, order), columns.gather(1, order))


def _top_columns(scorers, features, k, num_images, col_ids, backend) -> tuple[Tensor, Tensor]:
    chosen = dispatch.select(backend, scorers.device, scorers.dtype, scorers.dtype, scorers.shape[2])
    scorers, features = scorers.detach().contiguous(), features.detach().contiguous()
    return chosen.top_columns(scorers, features, k, num_images, None if col_ids is None else col_ids.contiguous())


def _shapes(scorers, features, k, num_images, col_ids, backend) -> tuple[Tensor, Tensor]:
    groups = scorers.shape[1]
    return scorers.new_empty(groups, k), scorers.new_empty(groups, k, dtype=torch.int64)


register(
    "top_columns",
    "(Tensor scorers, Tensor features, int k, SymInt num_images, Tensor? col_ids, str backend) -> "
    "(Tensor scores, Tensor columns)",
    _top_columns,
    _shapes,
)
