"""Which pairs (row i, column j) are negatives: the one classification every kernel and every loss shares.

A row is an anchor, a column a candidate. A pair is ignored when

  * both show the same image: row i shows image `i mod num_images`, column j, where 0 <= j - positive_offset < num_rows,
    shows image `(j - positive_offset) mod num_images`. This covers the anchor itself and its positives for two views
    (num_images = B), V views, CLIP (num_images = B = rows) and rank shards (positive_offset =
    the shard's first column); num_images = 0 says that the columns show other images altogether, a queue for instance;
  * both carry the same integer id;
  * the candidate is padding: its id is UNFILLED.

The last rule makes the mask asymmetric: a padded row is nobody's negative, yet as an anchor it has negatives of its
own. Hence two questions, `keep` (may j be a negative of i) and `keep_reverse` (may i be a negative of j); answering one
for the other costs 8 to 72 % of gradient error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNFILLED = torch.iinfo(torch.int64).min  # id of padding: nobody's negative
NO_ROW_ID = UNFILLED + 1  # what a side without ids carries: equal to nothing on the other side
NO_COLUMN_ID = UNFILLED + 2


@dataclass(frozen=True)
class Pairs:
    """The classification of an [num_rows, num_columns] problem; ids are int64 vectors or None."""

    num_rows: int
    num_columns: int
    num_images: int = 0
    positive_offset: int = 0
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    device: torch.device | None = None

    @property
    def has_ids(self) -> bool:
        return self.row_ids is not None or self.col_ids is not None

    def keep(self, rows: slice, cols: slice) -> Tensor | None:
        """Bool [rows, cols], True where column j is a negative of row i; None when all are."""
        return self._keep(rows, cols, candidates_are_rows=False)

    def keep_reverse(self, rows: slice, cols: slice) -> Tensor | None:
        """Bool [rows, cols], True where row i is a negative of column j; None when all are."""
        return self._keep(rows, cols, candidates_are_rows=True)

    def _keep(self, rows: slice, cols: slice, candidates_are_rows: bool) -> Tensor | None:
        keep = None
        if self._may_share_image(rows, cols):
            i = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
            j = torch.arange(cols.start, cols.stop, device=self.device)[None, :] - self.positive_offset
            keep = ((j - i) % self.num_images != 0) | (j < 0) | (j >= self.num_rows)
        if self.has_ids:
            row_ids = self._ids(self.row_ids, rows, NO_ROW_ID)[:, None]
            col_ids = self._ids(self.col_ids, cols, NO_COLUMN_ID)[None, :]
            by_id = (row_ids != col_ids) & ((row_ids if candidates_are_rows else col_ids) != UNFILLED)
            keep = by_id if keep is None else keep & by_id
        return keep

    def _ids(self, ids: Tensor | None, block: slice, missing: int) -> Tensor:
        if ids is None:
            return torch.full((block.stop - block.start,), missing, device=self.device)
        return ids[block]

    def _may_share_image(self, rows: slice, cols: slice) -> bool:
        if not self.num_images:
            return False
        lowest = cols.start - self.positive_offset - (rows.stop - 1)
        highest = cols.stop - 1 - self.positive_offset - rows.start
        next_multiple = -(-lowest // self.num_images) * self.num_images
        return next_multiple <= highest
