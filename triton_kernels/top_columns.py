"""The K best columns of every image: a running list beside the tile loop.

A column enters where its score exceeds the lowest of the list. Columns come in ascending order, so that of equals the
first keeps its place; of the lowest in a list the last column leaves. Once lists are good few columns enter, and a
tile without any costs its row maxima.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import UNFILLED, load_ids
from .scores import largest_scores

MAX_LISTED = 128  # a list is held in registers


@triton.jit(do_not_specialize=["groups", "num_columns", "num_images", "num_scorers", "span"])
def top_columns_kernel(
    p_scorers, p_features, p_col_ids, p_row_ids, p_excluded, p_below, p_scores, p_columns, groups, num_columns,
    num_images, num_scorers, span,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, split): tile i of the images, columns split * span up to the next split.

    p_col_ids to p_below  which columns are candidates, `problem.pairs.Candidates`, each may be None

    Writes scores and columns [splits, groups, K] in no order; where there are fewer, -inf and no column's number.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    PRECISION: tl.constexpr = TILE.precision
    i_split = tl.program_id(1)
    o_g = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n, o_k = tl.arange(0, BLOCK_N), tl.arange(0, K)
    b_list = tl.full((BLOCK_M, K), float("-inf"), p_scores.dtype.element_ty)
    b_columns = tl.zeros((BLOCK_M, K), tl.int32) + (2**31 - 1 - o_k)[None, :]  # different, so that one leaves at a time
    b_lowest = tl.min(b_list, 1)
    for j0 in range(i_split * span, tl.minimum(i_split * span + span, num_columns), BLOCK_N):
        o_j = j0 + o_n
        b_s = largest_scores(p_scorers, p_features, o_g, o_j, groups, num_columns, groups, num_scorers,
                             TILE.features, BLOCK_M, BLOCK_N, TILE.chunk, PRECISION, False)  # fmt: skip
        m_candidate = (o_g < groups)[:, None] & (o_j < num_columns)[None, :] & (b_s == b_s)
        if num_images > 0:
            m_candidate = m_candidate & (o_g[:, None] != (o_j % num_images)[None, :])
        if p_col_ids is not None:
            b_col_ids = load_ids(p_col_ids, o_j, num_columns)
            m_candidate = m_candidate & (b_col_ids != UNFILLED)[None, :]
            if p_row_ids is not None:
                m_candidate = m_candidate & (load_ids(p_row_ids, o_g, groups)[:, None] != b_col_ids[None, :])
        if p_excluded is not None:
            b_excluded = tl.load(p_excluded + o_g, mask=o_g < groups, other=-1)
            m_candidate = m_candidate & (b_excluded[:, None] != o_j[None, :])
        if p_below is not None:
            b_below = tl.load(p_below + o_g, mask=o_g < groups, other=0.0)
            m_candidate = m_candidate & (b_s < b_below[:, None])
        b_s = tl.where(m_candidate, b_s, float("-inf"))
        b_best, b_at = tl.max(b_s, 1, return_indices=True)
        while tl.max((b_best > b_lowest).to(tl.int32), 0) > 0:
            b_leaving = tl.max(tl.where(b_list == b_lowest[:, None], b_columns, -1), 1)
            m_here = (b_best > b_lowest)[:, None] & (b_columns == b_leaving[:, None])
            b_list = tl.where(m_here, b_best[:, None], b_list)
            b_columns = tl.where(m_here, (j0 + b_at)[:, None], b_columns)
            b_lowest = tl.min(b_list, 1)
            b_s = tl.where(o_n[None, :] == b_at[:, None], float("-inf"), b_s)
            b_best, b_at = tl.max(b_s, 1, return_indices=True)
    o_list = (i_split.to(tl.int64) * groups + o_g)[:, None] * K + o_k[None, :]
    tl.store(p_scores + o_list, b_list, mask=(o_g < groups)[:, None])
    tl.store(p_columns + o_list, b_columns, mask=(o_g < groups)[:, None])
