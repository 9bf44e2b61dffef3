"""Ranks from histograms: which bin of its anchor's range a logit lies in, and what that makes it weigh.

    RANGE  smallest and largest logit of every row     -> the axis of its histogram
    COUNT  negatives per bin, integer atomics: any order gives the same counts
    SUMS   log of the sum of omega e^s and, for diagnostics, of its square; sums of logits and of weights

Three launches of one tile loop: each pass needs the result of the one before. problem/ranking.py has the
mathematics; the backward is the one of the plain statistics with omega in its weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import online_lse
from .pairs import SIZES, Sizes, keep_tile, load_anchors
from .scores import LOG2E, chunked_scores, load_rows, load_scale


@triton.jit
def find_bin(b_logit, p_axis, o_anchors, num_anchors, BINS: tl.constexpr, AXIS: tl.constexpr):
    """Bin of every logit and its place in it, from 0 to 1; anchors along the other axis. A NaN goes to bin 0."""
    m_anchors = o_anchors < num_anchors
    b_low = tl.expand_dims(tl.load(p_axis + o_anchors, mask=m_anchors, other=0.0), AXIS)
    b_per_logit = tl.expand_dims(
        tl.load(p_axis + num_anchors.to(tl.int64) + o_anchors, mask=m_anchors, other=0.0), AXIS
    )
    b_position = (b_logit - b_low) * b_per_logit
    b_position = tl.where(b_position > 0.0, b_position, 0.0)
    b_position = tl.where(b_position < BINS, b_position, 1.0 * BINS)
    b_bin = tl.where(b_position < BINS - 1, b_position, 1.0 * (BINS - 1)).to(tl.int32)
    return b_bin, b_position - b_bin.to(b_position.dtype)


@triton.jit
def rank_weights(
    b_logit, histograms, p_shape, first, num_anchors, BLOCK: tl.constexpr, BINS: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """omega of a tile of logits, by the histograms of its rows (AXIS 1) or of its columns (AXIS 0) from `first` on.

    histograms = (axis, below) as `RankedStatistics` has them; p_shape: b, c, eps, low, high of `Ranking.coefficients`
    """
    p_axis, p_below = histograms
    o_anchors = first + tl.arange(0, BLOCK)
    b_bin, b_place = find_bin(b_logit, p_axis, o_anchors, num_anchors, BINS, AXIS)
    m_anchors = tl.expand_dims(o_anchors < num_anchors, AXIS)
    # 64 bits up to the first table only: 64-bit offsets for every pair would spill
    o_edges = tl.expand_dims(tl.arange(0, BLOCK) * (BINS + 1), AXIS) + b_bin
    p_edges = p_below + tl.full((), BINS + 1, tl.int64) * first + o_edges
    b_start = tl.load(p_edges, mask=m_anchors, other=0.0)
    b_end = tl.load(p_edges + 1, mask=m_anchors, other=0.0)
    p_count = p_axis + 2 * num_anchors.to(tl.int64) + o_anchors
    b_count = tl.load(p_count, mask=o_anchors < num_anchors, other=1.0)
    b_inverse, b_count = tl.expand_dims(1.0 / b_count, AXIS), tl.expand_dims(b_count, AXIS)
    b_rank = b_start + b_place * (b_end - b_start - 1.0) + 1.0
    b_rank = tl.minimum(tl.maximum(b_rank, 0.0), b_count)
    b_u, b_v = b_rank * b_inverse, (b_count - b_rank) * b_inverse
    b, c, eps = tl.load(p_shape), tl.load(p_shape + 1), tl.load(p_shape + 2)
    low, high = tl.load(p_shape + 3), tl.load(p_shape + 4)
    b_above, b_from_middle = b_v + eps, 2.0 * b_v - c
    b_root = tl.sqrt(b_from_middle * b_from_middle + 4.0 * b_u * b_above)
    # Phi/2 = u / (b + root) and (1 - Phi)/2 = above / (c + 2 eps + root), over their common denominator
    b_phi, b_rest = b_u * (b_root + (c + 2.0 * eps)), b_above * (b_root + b)
    return (low * b_rest + high * b_phi) / (b * b_rest + c * b_phi)


@triton.jit(do_not_specialize=[*SIZES])
def histogram_ranks_kernel(
    u, v, scale, histograms, p_shape, p_counts, p_out, num_rows, num_columns, span,
    rules, list_groups, scorer_groups, num_scorers, num_images, shard, first_row, first_column,
    PASS: tl.constexpr, BINS: tl.constexpr, EXPONENTS: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
    HAS_IMAGES: tl.constexpr, RULES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, split): tile i of the rows against columns split * span up to the next split.

    u, v             operands, (pointer, stride of the rows)
    histograms       of the rows: axis in COUNT and SUMS, below in SUMS
    p_shape          SUMS: what makes a rank a weight
    p_counts         [rows, bins], COUNT
    p_out            [splits, parts, rows]: RANGE smallest, largest; SUMS what `ranking.RankedStatistics` has of a
                     split: lse, log of the sum of squares, sum of logits, of weights, largest weight
    sizes and rules  see pairs.py
    """
    i0, i_split = tl.program_id(0) * TILE.rows, tl.program_id(1)
    sizes = Sizes(num_rows, num_columns, num_images, shard, first_row, first_column, list_groups, scorer_groups,
                  num_scorers)  # fmt: skip
    D: tl.constexpr = TILE.features
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_D: tl.constexpr = TILE.chunk
    PRECISION: tl.constexpr = TILE.precision
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    RESIDENT: tl.constexpr = BLOCK_D >= D
    scale = load_scale(scale, SCALE_IS_TENSOR)
    o_i, o_d = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_i = o_i < num_rows
    j_begin, j_end = i_split * span, tl.minimum(i_split * span + span, num_columns)
    anchors = load_anchors(o_i, j_begin, sizes, rules) if RULES is not None else ()
    b_nothing = tl.zeros((BLOCK_M,), DTYPE)
    b_lowest, b_highest = b_nothing + float("inf"), b_nothing + float("-inf")
    b_total, b_weights, b_largest = b_nothing, b_nothing, b_nothing
    state = online_lse.init(2, BLOCK_M, DTYPE, True)
    if RESIDENT:
        b_u = load_rows(u[0], o_i, o_d, num_rows, u[1], D, BLOCK_D)
    for j0 in range(j_begin, j_end, BLOCK_N):
        o_j = j0 + tl.arange(0, BLOCK_N)
        if RESIDENT:
            b_v = load_rows(v[0], o_j, o_d, num_columns, v[1], D, BLOCK_D)
            b_s = tl.dot(b_u, tl.trans(b_v), input_precision=PRECISION, out_dtype=DTYPE)
        else:
            b_s = chunked_scores(u, v, o_i, o_j, num_rows, num_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        b_logit = b_s * scale
        m_keep, _, anchors = keep_tile(o_i, o_j, j0 + BLOCK_N, sizes, rules, anchors, BLOCK_M, BLOCK_N, HAS_IMAGES,
                                       RULES)  # fmt: skip
        if PASS == "RANGE":
            b_lowest = tl.minimum(b_lowest, tl.min(tl.where(m_keep, b_logit, float("inf")), 1))
            b_highest = tl.maximum(b_highest, tl.max(tl.where(m_keep, b_logit, float("-inf")), 1))
        elif PASS == "COUNT":
            b_bin, _ = find_bin(b_logit, histograms[0], o_i, num_rows, BINS, 1)
            tl.atomic_add(p_counts + o_i.to(tl.int64)[:, None] * BINS + b_bin, 1, mask=m_keep, sem="relaxed")
        else:
            b_weight = rank_weights(b_logit, histograms, p_shape, i0, num_rows, BLOCK_M, BINS, 1)
            b_weight = tl.where(m_keep, b_weight, 0.0)
            # the weight within the exponent: the largest logit may weigh nothing and hide all others
            b_x = tl.where(m_keep, b_logit * LOG2E + tl.log2(b_weight), float("-inf"))
            state, _, _ = online_lse.update(state, b_x, EXPONENTS, 1, True)
            b_total += tl.sum(tl.where(m_keep, b_logit, 0.0), 1)
            b_weights += tl.sum(b_weight, 1)
            b_largest = tl.maximum(b_largest, tl.max(b_weight, 1))
    if PASS == "RANGE":
        p_rows = p_out + i_split.to(tl.int64) * 2 * num_rows + o_i
        tl.store(p_rows, b_lowest, mask=m_i)
        tl.store(p_rows + num_rows, b_highest, mask=m_i)
    elif PASS == "SUMS":
        p_rows = p_out + i_split.to(tl.int64) * 5 * num_rows + o_i
        part = num_rows.to(tl.int64)
        tl.store(p_rows, online_lse.finish(state, 0, EXPONENTS), mask=m_i)
        tl.store(p_rows + part, online_lse.finish(state, 1, EXPONENTS), mask=m_i)
        tl.store(p_rows + 2 * part, b_total, mask=m_i)
        tl.store(p_rows + 3 * part, b_weights, mask=m_i)
        tl.store(p_rows + 4 * part, b_largest, mask=m_i)
