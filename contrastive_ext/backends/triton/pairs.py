"""The pair rules of problem/pairs.py as arguments of the Triton kernels; triton_kernels/pairs.py applies them.

Lists arrive sorted, so that a sweep reads each of them once, with a cursor. Where columns are the anchors the kernel
asks the other way round: which anchors list this row. Sorting all entries by their candidate answers that, in O(N k)
memory for N anchors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem.pairs import Pairs
from ...problem.problem import Problem
from . import launch

END = torch.iinfo(torch.int32).max  # of a list; larger than any column


class Side(NamedTuple):
    """Rows or columns: operand, position of the first of the `num_rows` vectors that show the images, pair rules.

    ignored  lists of these vectors as anchors
    guide    the gate's scorers [S, G, E] or features [M, E] of these vectors, limit what they allow as anchors
    """

    x: Tensor
    first: int
    ids: Tensor | None
    ignored: Tensor | None
    guide: Tensor | None
    limit: Tensor | None


def sides(problem: Problem, u: Tensor, v: Tensor) -> tuple[Side, Side]:
    """Rows and columns of a problem, u and v their operands."""
    pairs, gate = problem.pairs, problem.pairs.gate
    ignored = None if pairs.ignored is None or pairs.ignored.numel() == 0 else pairs.ignored
    guides = (None,) * 4 if gate is None else (gate.scorers, gate.row_limit, gate.features, gate.col_limit)
    scorers, row_limit, features, col_limit = guides
    col_ignored = ignored if problem.one_set else None
    rows = Side(u, 0, pairs.row_ids, ignored, scorers, row_limit)
    return rows, Side(v, pairs.positive_offset, pairs.col_ids, col_ignored, features, col_limit)


def costliest_rule(pairs: Pairs) -> str:
    """The costliest rule beside the images': with any, masks are made for every tile and negatives are counted."""
    rules = {"gate": pairs.gate is not None, "lists": pairs.ignored is not None, "ids": pairs.has_ids, "images": True}
    return next(name for name, holds in rules.items() if holds)


def arguments(pairs: Pairs, rows: Side, cols: Side, row_anchors: bool, col_anchors: bool) -> dict[str, Any]:
    """The kernels' arguments about pairs of a sweep over `rows`, num_rows to RULES; which sides are anchors in it."""
    listed = listing = (None, None)  # type: tuple[Tensor | None, Tensor | None]
    rules = constant = None
    if rows.ignored is not None and row_anchors:
        listed = _listed(rows.ignored, len(cols.x))
    if cols.ignored is not None and col_anchors:
        listing = _listing(cols.ignored, len(cols.x), len(rows.x))
    num_scorers, scorer_groups, features = (0, 0, 0) if pairs.gate is None else pairs.gate.scorers.shape
    if costliest_rule(pairs) != "images":
        limits = rows.limit if row_anchors else None, cols.limit if col_anchors else None
        rules = (rows.ids, cols.ids), (rows.guide, cols.guide, *limits), listed, listing
        columns_are_scorers = cols.guide is not None and cols.guide.dim() == 3
        chunk = launch.guide_chunk(rows.x.device)
        constant = launch.kernels().pairs.Rules(pairs.only_equal_ids, features, chunk, columns_are_scorers)
    return {
        "num_rows": len(rows.x),
        "num_columns": len(cols.x),
        "num_images": pairs.num_images,
        "shard": pairs.num_rows,
        "first_row": rows.first,
        "first_column": cols.first,
        "list_groups": 0 if rows.ignored is None else len(rows.ignored),
        "scorer_groups": scorer_groups,
        "num_scorers": num_scorers,
        "rules": rules,
        "HAS_IMAGES": pairs.num_images > 0,
        "RULES": constant,
    }


def _listed(ignored: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(starts, lists): the lists [G, k] one after the other, each sorted and ended by END."""
    groups, length = ignored.shape
    inside = (ignored >= 0) & (ignored < columns)
    lists = torch.nn.functional.pad(ignored.where(inside, END).sort(1).values, (0, 1), value=END)
    return _starts(torch.arange(groups + 1, device=ignored.device) * (length + 1), lists), lists.int().flatten()


def _listing(ignored: Tensor, anchors: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The lists the other way round: for each candidate the anchors that list it, ascending, ended by END."""
    (groups, length), every = ignored.shape, torch.arange(candidates + 1, device=ignored.device)
    lists = ignored.repeat(anchors // groups, 1).flatten()
    listed = torch.cat([lists.where((lists >= 0) & (lists < candidates), candidates), every[:-1]])
    listed, order = listed.sort(stable=True)
    by_candidate = torch.where(order < len(lists), order // length, END)
    return _starts(torch.searchsorted(listed, every), by_candidate), by_candidate.int()


def _starts(starts: Tensor, entries: Tensor) -> Tensor:
    return starts.int() if entries.numel() < 2**31 else starts
