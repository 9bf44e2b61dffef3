"""Which pairs (row i, column j) are negatives: the one classification every kernel and every loss shares.

A row is an anchor, a column a candidate. A pair is ignored when

  * both show the same image: row i shows image `i mod num_images`, column j, where 0 <= j - positive_offset < num_rows,
    shows image `(j - positive_offset) mod num_images`. This covers the anchor itself and its positives for two views
    (num_images = B), V views, CLIP (num_images = B = rows) and rank shards (positive_offset =
    the shard's first column); num_images = 0 says that the columns show other images altogether, a queue for instance;
  * both carry the same integer id, or with `only_equal_ids` a different one (the positives of a supervised loss);
  * the candidate is padding: its id is UNFILLED;
  * the row lists the column: `ignored` holds the columns each image's rows ignore (detected false negatives);
  * a second similarity, a guide's, exceeds the row's limit: `Gate`.

The last three make the mask asymmetric: a padded row is nobody's negative, yet as an anchor it has negatives of its
own, and lists and limits belong to the anchor. Hence two questions, `keep` (may j be a negative of i) and
`keep_reverse` (may i be a negative of j); answering one for the other costs 8 to 72 % of gradient error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import can_read, check_tensor, describe

UNFILLED = torch.iinfo(torch.int64).min  # id of padding: nobody's negative
NO_ROW_ID = UNFILLED + 1  # what a side without ids carries: equal to nothing on the other side
NO_COLUMN_ID = UNFILLED + 2
LARGEST_RESERVED_ID = NO_COLUMN_ID  # ids of callers are larger
NO_COLUMN = -1  # fills up the lists of `ignored`


@dataclass(frozen=True)
class Gate:
    """Column j is no negative of row i where max_s <scorers[s, i mod G], features[j]> > row_limit[i].

    scorers    [S, G, E]  G divides the number of rows: rows of one image share their scorers
    features   [M, E]     of the columns
    row_limit  [N]
    col_limit  [M] or None; where columns are anchors too (one set, or statistics of columns), row i is no negative of
               column j where <scorers[0, i], features[j]> > col_limit[j]; then S = 1 and G = N, and with one set
               features are scorers[0] and col_limit is row_limit
    """

    scorers: Tensor
    features: Tensor
    row_limit: Tensor
    col_limit: Tensor | None = None

    def cancels(self, rows: slice, cols: slice, candidates_are_rows: bool = False) -> Tensor:
        """Bool [rows, cols], True where the largest score over the scorers exceeds the anchor's limit."""
        i = torch.arange(rows.start, rows.stop, device=self.scorers.device) % self.scorers.shape[1]
        scores = (self.scorers[:, i] @ self.features[cols].T).amax(0)
        if candidates_are_rows:
            assert self.col_limit is not None  # row_stats asks for one where columns are anchors
            return scores > self.col_limit[None, cols]
        return scores > self.row_limit[rows, None]


@dataclass(frozen=True)
class Pairs:
    """The classification of an [num_rows, num_columns] problem; ids are int64 vectors or None.

    ignored  [G, k] int64, columns that the rows i with i mod G = g ignore, in any order, NO_COLUMN where there are
             fewer; with one set that is also what columns, as anchors, ignore
    """

    num_rows: int
    num_columns: int
    num_images: int = 0
    positive_offset: int = 0
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    only_equal_ids: bool = False
    ignored: Tensor | None = None
    gate: Gate | None = None
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
        rules = []
        if self._may_share_image(rows, cols):
            i = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
            j = torch.arange(cols.start, cols.stop, device=self.device)[None, :] - self.positive_offset
            rules.append(((j - i) % self.num_images != 0) | (j < 0) | (j >= self.num_rows))
        if self.has_ids:
            row_ids = self._ids(self.row_ids, rows, NO_ROW_ID)[:, None]
            col_ids = self._ids(self.col_ids, cols, NO_COLUMN_ID)[None, :]
            rules.append((row_ids == col_ids) if self.only_equal_ids else (row_ids != col_ids))
            rules.append((row_ids if candidates_are_rows else col_ids) != UNFILLED)
        if self.ignored is not None:
            listed = _listed(self.ignored, cols, rows).T if candidates_are_rows else _listed(self.ignored, rows, cols)
            rules.append(~listed)
        if self.gate is not None:
            rules.append(~self.gate.cancels(rows, cols, candidates_are_rows))
        keep = None
        for rule in rules:
            keep = rule if keep is None else keep & rule
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


def _listed(ignored: Tensor, anchors: slice, candidates: slice) -> Tensor:
    """Bool [anchors, candidates], True where the anchor's list holds the candidate."""
    lists = ignored[torch.arange(anchors.start, anchors.stop, device=ignored.device) % len(ignored)]
    width = candidates.stop - candidates.start
    inside = (lists >= candidates.start) & (lists < candidates.stop)
    listed = torch.zeros(len(lists), width + 1, dtype=torch.bool, device=ignored.device)  # the last: outside
    return listed.scatter_(1, (lists - candidates.start).where(inside, width), True)[:, :width]


def integers(name: str, x: Tensor, shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    """x, integers of `shape` ([n]: also [n, 1]) on `device`, as int64; TypeError or ValueError for anything else.

    The three smallest int64 mean padding and sides without ids: refused where reading costs no wait.
    """
    check_tensor(name, x)
    shape = tuple(shape) if isinstance(shape, tuple) else (shape,)  # a symbolic size is no int
    fits = (x.shape == shape or (len(shape) == 1 and x.shape == (*shape, 1))) and x.device == device
    if x.is_floating_point() or x.is_complex() or not fits:
        raise ValueError(f"{name} must be integers {list(shape)} on {device}; got {describe(x)}.")
    numbers = x.reshape(shape).long()
    if can_read(x) and x.dtype.itemsize == 8 and x.numel():
        smallest = int(numbers.min())
        if smallest <= LARGEST_RESERVED_ID:
            raise ValueError(f"{name} must be above -2^63 + 2, what lies below is reserved; got {smallest}.")
    return numbers


@dataclass(frozen=True)
class Candidates:
    """Which columns may be among the best of an image; what is None leaves nobody out.

    num_images  0, or the number of images: column j shows image j mod num_images, and is no candidate of it
    col_ids     [M] int64: columns whose id is UNFILLED are nobody's candidates
    row_ids     [G] int64, with col_ids: columns of an image's own id are none of it
    excluded    [G] int64: one column of each image (NO_COLUMN: none)
    below       [G] a candidate's score is smaller
    """

    num_images: int = 0
    col_ids: Tensor | None = None
    row_ids: Tensor | None = None
    excluded: Tensor | None = None
    below: Tensor | None = None
