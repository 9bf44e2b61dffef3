"""Which pairs of a tile are negatives; contrastive_ext/problem/pairs.py states the rules.

Every sweep takes `sizes`, `rules` and the constants HAS_IMAGES and RULES. A rule that a call lacks costs nothing: its
pointers are None, and `rules` and RULES are None where the images' rule is the only one.

    rules = (ids of the rows, of the columns), (guide of the rows, of the columns, limit of the rows, of the columns),
            listed, listing

`listed` are lists of the columns that a row ignores, `listing` of those that ignore it, each (starts, entries).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import largest_scores

UNFILLED = tl.constexpr(-(2**63))  # contrastive_ext.pairs.UNFILLED: padding, nobody's negative


class Sizes(NamedTuple):
    """Numbers of a sweep's problem.

    `shard` rows from first_row on and as many columns from first_column on show image (position in the shard) mod
    num_images. The forward has first_row = 0 and first_column = positive_offset; with the roles of rows and columns
    swapped (the gradient of the columns) it is the other way round.

    list_groups, scorer_groups  rows whose numbers are equal mod these share their lists, their scorers

    Triton takes tuples as arguments, but specialises every number in one: as `sizes` in a single argument every batch
    size would compile kernels of its own. So kernels take the numbers one by one and put them together themselves;
    for the same reason pointers that may be unaligned stay outside of tuples. The order of a kernel's arguments is part
    of its table in docs/compiled: another one costs up to 28 registers.
    """

    num_rows: int
    num_columns: int
    num_images: int
    shard: int
    first_row: int
    first_column: int
    list_groups: int
    scorer_groups: int
    num_scorers: int


class Rules(NamedTuple):
    """The constant RULES of the sweeps: `only_equal_ids` as in problem/pairs.py, and what a gate is.

    features, chunk      features of the guide, and of the chunks they come in; 0 features without a gate
    columns_are_scorers  whether the columns have the scorers, not the rows
    """

    only_equal_ids: bool
    features: int
    chunk: int
    columns_are_scorers: bool


SIZES = (*Sizes._fields, "span")  # do_not_specialize of every sweep


@triton.jit
def first_masked(
    i0, j0, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_IMAGES: tl.constexpr, ROW_TAILS: tl.constexpr
):  # fmt: skip
    """A column: of the tiles from j0 on, the first that starts there or later has padding or may hold an image twice.

    A loop compares with it, and asks again after such a tile. ROW_TAILS: rows beyond the matrix matter too.
    """
    first = sizes.num_columns - BLOCK_N + 1
    if HAS_IMAGES:
        num_images = sizes.num_images
        # first multiple of num_images among the differences of positions, with signs that // rounds alike everywhere
        lowest = (j0 - sizes.first_column) - (i0 + BLOCK_M - 1 - sizes.first_row)
        above = (tl.maximum(lowest, 0) + num_images - 1) // num_images
        multiple = (above - tl.maximum(-lowest, 0) // num_images) * num_images
        first = tl.minimum(first, multiple + sizes.first_column + i0 - sizes.first_row - BLOCK_N + 1)
    if ROW_TAILS:
        first = tl.where(i0 + BLOCK_M > sizes.num_rows, j0, first)
    return first


@triton.jit
def load_ids(p_ids, o_rows, num_rows):
    """The ids of o_rows."""
    return tl.load(p_ids + o_rows, mask=o_rows < num_rows, other=UNFILLED)


@triton.jit
def image_of(o_position, shard, num_images, NONE: tl.constexpr):
    """Which image each position in the shard shows."""
    return tl.where((o_position >= 0) & (o_position < shard), o_position % num_images, NONE)


@triton.jit
def keep_images(o_i, o_j, sizes, HAS_IMAGES: tl.constexpr):
    """True for pairs inside the matrix that do not show the same image."""
    m_keep = (o_i < sizes.num_rows)[:, None] & (o_j < sizes.num_columns)[None, :]
    if HAS_IMAGES:
        # one remainder per row and per column, not per pair; what shows no image gets a number nothing else has
        b_row_image = image_of(o_i - sizes.first_row, sizes.shard, sizes.num_images, -1)
        b_col_image = image_of(o_j - sizes.first_column, sizes.shard, sizes.num_images, -2)
        m_keep = m_keep & (b_row_image[:, None] != b_col_image[None, :])
    return m_keep


@triton.jit
def load_anchors(o_i, j_begin, sizes, rules):
    """What the rules know about the rows of a sweep from column j_begin on: (ids, limit, cursors)."""
    ids, guide, listed, listing = rules
    b_ids = load_ids(ids[0], o_i, sizes.num_rows) if ids[0] is not None else ()
    b_limit = load_limit(guide[2], o_i, sizes.num_rows) if guide[2] is not None else ()
    cursor = first_entry(listed, sizes.list_groups, o_i, j_begin) if listed[0] is not None else ()
    reverse_cursor = first_entry(listing, sizes.num_rows, o_i, j_begin) if listing[0] is not None else ()
    return b_ids, b_limit, cursor, reverse_cursor


@triton.jit
def keep_tile(
    o_i, o_j, j_stop, sizes, rules, anchors,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_IMAGES: tl.constexpr, RULES: tl.constexpr,
):  # fmt: skip
    """(keep, keep_reverse, anchors): is the column a negative of the row, the row one of the column; cursors moved."""
    m_keep = keep_images(o_i, o_j, sizes, HAS_IMAGES)
    m_reverse = m_keep
    if RULES is not None:
        ids, guide, listed, listing = rules
        b_row_ids, b_row_limit, cursor, reverse_cursor = anchors
        b_col_ids = load_ids(ids[1], o_j, sizes.num_columns) if ids[1] is not None else None
        if ids[0] is not None and ids[1] is not None:
            m_equal = b_row_ids[:, None] == b_col_ids[None, :]
            m_keep = m_keep & (m_equal if RULES.only_equal_ids else ~m_equal)
            m_reverse = m_keep
        if ids[0] is not None:
            m_reverse = m_reverse & (b_row_ids != UNFILLED)[:, None]
        if ids[1] is not None:
            m_keep = m_keep & (b_col_ids != UNFILLED)[None, :]
        if listed[0] is not None:
            m_listed, cursor = listed_tile(listed[1], cursor, o_j, j_stop, BLOCK_M, BLOCK_N)
            m_keep = m_keep & ~m_listed
        if listing[0] is not None:
            m_listed, reverse_cursor = listed_tile(listing[1], reverse_cursor, o_j, j_stop, BLOCK_M, BLOCK_N)
            m_reverse = m_reverse & ~m_listed
        if guide[0] is not None:
            p_row_guide, p_col_guide, p_row_limit, p_col_limit = guide
            b_score = largest_scores(p_row_guide, p_col_guide, o_i, o_j, sizes.num_rows, sizes.num_columns,
                                     sizes.scorer_groups, sizes.num_scorers, RULES.features, BLOCK_M, BLOCK_N,
                                     RULES.chunk, "ieee", RULES.columns_are_scorers)  # fmt: skip
            if p_row_limit is not None:
                m_keep = m_keep & ~(b_score > b_row_limit[:, None])
            if p_col_limit is not None:
                m_reverse = m_reverse & ~(b_score > load_limit(p_col_limit, o_j, sizes.num_columns)[None, :])
        anchors = b_row_ids, b_row_limit, cursor, reverse_cursor
    return m_keep, m_reverse, anchors


@triton.jit
def load_limit(p_limit, o_anchors, num_anchors):
    """The limits of anchors; what exceeds them is cancelled."""
    return tl.load(p_limit + o_anchors, mask=o_anchors < num_anchors, other=0.0)


@triton.jit
def first_entry(lists, groups, o_rows, j_begin):
    """A cursor on the first column >= j_begin in the list of every row: (place, column, lowest column of all rows).

    lists = (p_starts, p_columns): from starts[i mod groups] on the columns of row i, ascending, then 2^31 - 1.
    """
    p_starts, p_columns = lists
    b_place = tl.load(p_starts + o_rows % groups)
    b_after = tl.load(p_starts + o_rows % groups + 1) - 1
    while tl.max(b_after - b_place, 0) > 0:
        b_middle = (b_place + b_after) // 2
        m_before = tl.load(p_columns + b_middle) < j_begin  # never at the end: that is 2^31 - 1
        b_place = tl.where(m_before, b_middle + 1, b_place)
        b_after = tl.where(m_before, b_after, b_middle)
    b_column = tl.load(p_columns + b_place)
    return b_place, b_column, tl.min(b_column, 0)


@triton.jit
def listed_tile(p_columns, cursor, o_j, j_stop, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where the row's list holds the column, and the cursor on the first column >= j_stop.

    A tile that no list reaches costs one comparison; otherwise as many rounds as the busiest row has entries in it.
    """
    b_place, b_column, lowest = cursor
    m_listed = tl.zeros((BLOCK_M, BLOCK_N), tl.int1)
    while lowest < j_stop:
        m_listed = m_listed | (b_column[:, None] == o_j[None, :])
        b_place += (b_column < j_stop).to(b_place.dtype)
        b_column = tl.load(p_columns + b_place)
        lowest = tl.min(b_column, 0)
    return m_listed, (b_place, b_column, lowest)
