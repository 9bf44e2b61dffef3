"""Row statistics, and where asked those of the columns and the mean of the columns, in one sweep over tiles.

    s = scale u v^T, tile by tile  ->  partial sums of exp(beta_k s) per row and split of the columns
                                   ->  partial sums per column and tile of rows               COLUMNS
                                   ->  sum_j exp(beta_0 s_ij) v_j, like an attention output   MEANS

A program owns one tile of rows and one split of the columns, so every partial has one writer; merge.py adds them in a
fixed order. TRIANGLE: with one set s_ij = s_ji, so a tile of rows begins at its own columns, and what comes after them
counts for both sides; those columns' sums are completed by the column partials of the tiles above them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import online_lse, softplus
from .merge import pack, store_parts
from .pairs import SIZES, Sizes, first_masked, keep_images, keep_tile, load_anchors
from .scores import LOG2E, add_product, load_operand, load_scale, scores_by_chunks, scores_of

FP16_RANGE = tl.constexpr(16384.0)  # exponentials up to 1 use the upper half of fp16's range, small ones stay normal


@triton.jit
def tally(counts, b_x, m_keep, AXIS: tl.constexpr):
    """Number of negatives, largest and sum of their logits."""
    b_count, b_largest, b_total = counts
    b_count += tl.sum(m_keep.to(b_count.dtype), AXIS)
    b_largest = tl.maximum(b_largest, tl.max(b_x, AXIS))
    return b_count, b_largest, b_total + tl.sum(tl.where(m_keep, b_x, 0.0), AXIS)


@triton.jit
def sweep(
    u, d_u, v, d_v, log2_scale, p_offset, outputs, where, sizes, rules,
    EXPONENTS: tl.constexpr, ONLINE: tl.constexpr, PARTS: tl.constexpr, HAS_IMAGES: tl.constexpr, RULES: tl.constexpr,
    COLUMNS: tl.constexpr, TRIANGLE: tl.constexpr, MEANS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The tile loop of the forward; p_offset [rows] makes it that of pair_sums.py, None: of row statistics."""
    num_rows, num_columns = sizes.num_rows, sizes.num_columns
    p_rows, p_columns, p_mean = outputs
    i0, j_begin, j_end = where
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    D: tl.constexpr = TILE.features
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_D: tl.constexpr = TILE.chunk
    PRECISION: tl.constexpr = TILE.precision
    RESIDENT: tl.constexpr = BLOCK_D >= D
    COUNTED: tl.constexpr = RULES is not None
    MASKED: tl.constexpr = COUNTED or PARTS.diagnostics
    o_i, o_d = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    anchors = load_anchors(o_i, j_begin, sizes, rules) if COUNTED else ()
    if RESIDENT:
        b_u = load_operand(u, d_u, i0, num_rows, D, BLOCK_M, BLOCK_D, PRECISION)
    state = online_lse.init(len(EXPONENTS), BLOCK_M, DTYPE, ONLINE)
    if p_offset is not None:
        b_offset = tl.load(p_offset + o_i, mask=o_i < num_rows, other=float("-inf")) * LOG2E
    b_nothing = tl.zeros((BLOCK_M,), DTYPE)
    counts = b_nothing, b_nothing + float("-inf"), b_nothing
    if MEANS:
        b_mean = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    j_masked = first_masked(i0, j_begin, sizes, BLOCK_M, BLOCK_N, HAS_IMAGES, COLUMNS)
    for j_tile in range(j_begin // BLOCK_N, tl.cdiv(j_end, BLOCK_N)):
        j0 = j_tile * BLOCK_N
        o_j = j0 + tl.arange(0, BLOCK_N)
        if RESIDENT:
            b_v = load_operand(v, d_v, j0, num_columns, D, BLOCK_N, BLOCK_D, PRECISION)
            b_s = scores_of(b_u, b_v, PRECISION, DTYPE)
        else:
            b_s = scores_by_chunks(u, d_u, v, d_v, i0, j0, num_rows, num_columns, TILE)
        b_x = b_s * log2_scale
        if p_offset is not None:
            b_x += b_offset[:, None]
        b_reverse = b_x
        if MASKED:
            m_keep, m_reverse, anchors = keep_tile(o_i, o_j, j0 + BLOCK_N, sizes, rules, anchors, BLOCK_M, BLOCK_N,
                                                   HAS_IMAGES, RULES)  # fmt: skip
            b_reverse = tl.where(m_reverse, b_x, float("-inf"))
            b_x = tl.where(m_keep, b_x, float("-inf"))
            counts = tally(counts, b_x, m_keep, 1)
        else:
            if j0 >= j_masked:
                m_keep = keep_images(o_i, o_j, sizes, HAS_IMAGES)
                b_x = tl.where(m_keep, b_x, float("-inf"))
                j_masked = first_masked(i0, j0 + BLOCK_N, sizes, BLOCK_M, BLOCK_N, HAS_IMAGES, COLUMNS)
            b_reverse = b_x
        if p_offset is not None:
            state = softplus.update(state, b_x)
        else:
            state, b_exp, b_rescale = online_lse.update(state, b_x, EXPONENTS, 1, ONLINE)
        if MEANS:
            b_weight = b_exp[0] * FP16_RANGE if b_v[0].dtype == tl.float16 else b_exp[0]
            b_mean = add_product(b_mean * b_rescale[0][:, None], b_weight, b_v, PRECISION, DTYPE)
        if COLUMNS and (not TRIANGLE or j0 >= i0 + BLOCK_M):
            col_state = online_lse.init(len(EXPONENTS), BLOCK_N, DTYPE, ONLINE)
            col_state, _, _ = online_lse.update(col_state, b_reverse, EXPONENTS, 0, ONLINE)
            b_none = tl.zeros((BLOCK_N,), DTYPE)
            col_counts = b_none, b_none + float("-inf"), b_none
            if MASKED:
                col_counts = tally(col_counts, b_reverse, m_reverse, 0)
            store_parts(p_columns, o_j, num_columns, pack(col_state, col_counts, PARTS))
    store_parts(p_rows, o_i, num_rows, pack(state, counts, PARTS))
    if MEANS:
        b_mean = b_mean / FP16_RANGE if u[0].dtype.element_ty == tl.float16 else b_mean
        m_mean = (o_i < num_rows)[:, None] & (o_d < D)[None, :]
        tl.store(p_mean + o_i.to(tl.int64)[:, None] * D + o_d[None, :], b_mean, mask=m_mean)


# partial results may begin anywhere: a ragged batch must not compile
@triton.jit(do_not_specialize=[*SIZES, "first_tile"], do_not_specialize_on_alignment=["p_rows", "p_columns"])
def row_stats_forward_kernel(
    u, d_u, v, d_v, scale, p_rows, p_columns, p_mean, num_rows, num_columns, first_tile, span,
    rules, list_groups, scorer_groups, num_scorers, num_images, shard, first_row, first_column,
    EXPONENTS: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
    PARTS: tl.constexpr, HAS_IMAGES: tl.constexpr, RULES: tl.constexpr, COLUMNS: tl.constexpr, TRIANGLE: tl.constexpr,
    MEANS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, split): tile first_tile + i of the rows against columns split * span up to the next split.

    u, d_u, v, d_v      operands, see `load_tile`
    p_rows, p_columns   partial results, see merge.py; p_mean [splits, rows, D] or None
    sizes and rules     see pairs.py

    SHIFT is "plain", "online", or "device" where the scale is a tensor: then the whole program takes one of the two.
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    log2_scale = load_scale(scale, SCALE_IS_TENSOR) * LOG2E
    sizes = Sizes(num_rows, num_columns, num_images, shard, first_row, first_column, list_groups, scorer_groups,
                  num_scorers)  # fmt: skip
    p_rows += i_split.to(tl.int64) * PARTS.number * num_rows
    if COLUMNS:
        p_columns += i_tile.to(tl.int64) * PARTS.number * num_columns
    if MEANS:
        p_mean += i_split.to(tl.int64) * num_rows * TILE.features
    outputs = (p_rows, p_columns, p_mean)
    i0, j_begin = (first_tile + i_tile) * TILE.rows, i_split * span
    where = (i0, tl.maximum(j_begin, i0) if TRIANGLE else j_begin, tl.minimum(j_begin + span, num_columns))
    if SHIFT == "device":
        if log2_scale * LARGEST <= online_lse.MAX_PLAIN:
            sweep(u, d_u, v, d_v, log2_scale, None, outputs, where, sizes, rules, EXPONENTS, False, PARTS, HAS_IMAGES,
                  RULES, COLUMNS, TRIANGLE, MEANS, TILE)  # fmt: skip
        else:
            sweep(u, d_u, v, d_v, log2_scale, None, outputs, where, sizes, rules, EXPONENTS, True, PARTS, HAS_IMAGES,
                  RULES, COLUMNS, TRIANGLE, MEANS, TILE)  # fmt: skip
    else:
        sweep(u, d_u, v, d_v, log2_scale, None, outputs, where, sizes, rules, EXPONENTS, SHIFT == "online", PARTS,
              HAS_IMAGES, RULES, COLUMNS, TRIANGLE, MEANS, TILE)  # fmt: skip
