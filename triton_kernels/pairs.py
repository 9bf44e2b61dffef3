"""Which pairs of a tile are negatives; contrastive_ext/pairs.py states the rules.

`images` = (num_images, shard, first_row, first_column): `shard` rows from first_row on and as many columns from
first_column on show image (position in the shard) mod num_images. The forward has first_row = 0 and first_column =
positive_offset; with the roles of rows and columns swapped (the gradient of the columns) it is the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNFILLED = tl.constexpr(-(2**63))  # contrastive_ext.pairs.UNFILLED: padding, nobody's negative


@triton.jit
def needs_mask(
    i0, j0, num_rows, num_columns, images,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_IMAGES: tl.constexpr,
):  # fmt: skip
    """Whether a tile has padding or may hold two views of an image; the same answer in the whole program."""
    answer = (i0 + BLOCK_M > num_rows) | (j0 + BLOCK_N > num_columns)
    if HAS_IMAGES:
        num_images, _, first_row, first_column = images
        # is a multiple of num_images among the differences of positions? with signs that do not depend on how % rounds
        highest = (j0 + BLOCK_N - 1 - first_column) - (i0 - first_row)
        width: tl.constexpr = BLOCK_M + BLOCK_N - 2
        from_zero = tl.where(highest >= 0, highest, width - highest)
        answer = answer | (from_zero % num_images <= width)
    return answer


@triton.jit
def load_ids(p_ids, o_rows, num_rows):
    """The ids of o_rows."""
    return tl.load(p_ids + o_rows, mask=o_rows < num_rows, other=UNFILLED)


@triton.jit
def image_of(o_position, shard, num_images, NONE: tl.constexpr):
    """Which image each position in the shard shows."""
    return tl.where((o_position >= 0) & (o_position < shard), o_position % num_images, NONE)


@triton.jit
def keep_tile(
    o_i, o_j, num_rows, num_columns, images, b_row_ids, b_col_ids,
    HAS_IMAGES: tl.constexpr, CANDIDATES_ARE_ROWS: tl.constexpr,
):  # fmt: skip
    """True where the column is a negative of the row, or the row of the column where CANDIDATES_ARE_ROWS."""
    m_keep = (o_i < num_rows)[:, None] & (o_j < num_columns)[None, :]
    if HAS_IMAGES:
        num_images, shard, first_row, first_column = images
        # one remainder per row and per column, not per pair; what shows no image gets a number nothing else has
        b_row_image = image_of(o_i - first_row, shard, num_images, -1)
        b_col_image = image_of(o_j - first_column, shard, num_images, -2)
        m_keep = m_keep & (b_row_image[:, None] != b_col_image[None, :])
    if b_row_ids is not None and b_col_ids is not None:
        m_keep = m_keep & (b_row_ids[:, None] != b_col_ids[None, :])
    if CANDIDATES_ARE_ROWS:
        if b_row_ids is not None:
            m_keep = m_keep & (b_row_ids != UNFILLED)[:, None]
    elif b_col_ids is not None:
        m_keep = m_keep & (b_col_ids != UNFILLED)[None, :]
    return m_keep
