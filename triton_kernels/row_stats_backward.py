"""The gradient of row statistics: a row-parallel sweep like the forward, a second product instead of sums.

    w_ij = sum_k beta_k (a_k,i exp(beta_k s_ij - lse_k,i)      FORWARD, where j is a negative of i
                       + c_k,j exp(beta_k s_ij - lse'_k,j))    REVERSE, where i is a negative of j
    du_i = scale sum_j w_ij v_j

Sums over pairs have a sigmoid in place of the exponential, w_ij = a_i sigmoid(s_ij - lse_i), and -lse_i for an offset.

One set: c = a, lse' = lse, and this one sweep is the whole gradient. Two sets: the same kernel with the roles swapped
makes dv. Every row is summed by one program (per split of the columns), in column order: no atomics.

Up to 256 features the sum stays in registers. Beyond, the weights of a bounded number of rows are stored and a library
product finishes the work, one more pass over the weights instead of one more score product per 256 features.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .histogram_ranks import rank_weights
from .online_lse import exponentials
from .pairs import SIZES, Sizes, first_masked, keep_images, keep_tile, load_anchors
from .scores import LOG2E, add_product, load_operand, load_scale, round_to, scores_by_chunks, scores_of
from .softplus import sigmoid

# One exponential may serve both terms, e_ij (a_i e^-lse_i + c_j e^-lse'_j), while each factor stays in float32's normal
# range: exponents up to 64 leave 2^62 for upstream gradients and 2^-62 for batches and means. Where upstream gradients
# are in a and c, these are brought to 1 by a power of two first: `power_of`.
MAX_FACTORED = tl.constexpr(64.0)
FP16_EXPONENT = tl.constexpr(14.0)  # of fp16 weights after scaling: neither overflow nor underflow matters
LARGEST_BLOCK = tl.constexpr(1024)


@triton.jit
def largest(p_grad, num_anchors):
    """max_j |p_grad[j]|: every program reads all of it, which is less than a launch, and little beside the columns."""
    o_block = tl.arange(0, LARGEST_BLOCK)
    b_largest = tl.zeros((LARGEST_BLOCK,), p_grad.dtype.element_ty)
    for start in range(0, num_anchors, LARGEST_BLOCK):
        o_j = start + o_block
        b_largest = tl.maximum(b_largest, tl.abs(tl.load(p_grad + o_j, mask=o_j < num_anchors, other=0.0)))
    return tl.max(b_largest, 0)


@triton.jit
def power_of(p_grad, p_other_grad, num_anchors, num_others, NUM: tl.constexpr):
    """The power of two that brings the largest coefficient of both sides near 1: times exp(-lse) none underflows."""
    bound = largest(p_grad, NUM * num_anchors)
    if p_other_grad is not None:
        bound = tl.maximum(bound, largest(p_other_grad, NUM * num_others))
    return tl.exp2(tl.minimum(tl.maximum(-tl.ceil(tl.log2(bound)), -100.0), 100.0))


@triton.jit
def load_term(p_lse, p_grad, power, o_anchors, num_anchors, EXPONENTS: tl.constexpr, FACTORED: tl.constexpr):
    """(lse_k in units of log 2, beta_k a_k) of anchors; FACTORED: a_k is times `power` and carries exp(-lse_k)."""
    b_lses, b_factors = (), ()
    for k in tl.static_range(len(EXPONENTS)):
        o_k = k * num_anchors.to(tl.int64) + o_anchors
        b_lse = tl.load(p_lse + o_k, mask=o_anchors < num_anchors, other=float("inf")) * LOG2E
        # no negatives: the weight is exp2(x - inf) = 0, not NaN
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_factor = tl.load(p_grad + o_k, mask=o_anchors < num_anchors, other=0.0) * EXPONENTS[k]
        if FACTORED:
            b_factor = b_factor * power * tl.exp2(-b_lse)
        b_lses, b_factors = b_lses + (b_lse,), b_factors + (b_factor,)
    return b_lses, b_factors


@triton.jit
def store_terms(p_terms, stride, o_anchors, b_lses, b_factors, factored, NUM: tl.constexpr):
    """Terms of anchors as columns, for `load_columns`; lse and factors as `load_term` has them, not factored yet."""
    m_inside = o_anchors < stride
    for k in tl.static_range(NUM):
        b_factor = tl.where(factored, b_factors[k] * tl.exp2(-b_lses[k]), b_factors[k])
        tl.store(p_terms + k * stride + o_anchors, b_factor, mask=m_inside)
        tl.store(p_terms + (NUM + k) * stride + o_anchors, b_lses[k], mask=m_inside)


@triton.jit
def is_factored(scale, LARGEST: tl.constexpr, SHIFT: tl.constexpr):
    """Whether one exponential serves both terms of a weight: MAX_FACTORED."""
    if SHIFT == "device":
        return scale * LOG2E * LARGEST <= MAX_FACTORED
    else:
        return SHIFT == "plain"


@triton.jit(
    do_not_specialize=["num_anchors", "num_others"], do_not_specialize_on_alignment=["p_lse", "p_grad", "p_other_grad"]
)
def column_terms_kernel(
    p_lse, p_grad, p_other_grad, scale, p_terms, p_power, p_bounds, num_anchors, num_others, stride,
    EXPONENTS: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of the columns, once a call: p_terms [2 K, stride], beta_k c_k (times exp(-lse'_k) if factored), lse'_k.

    Padded to `stride` with anchors that weigh nothing: a tile reads whole vectors, without a mask. If factored they are
    times a power of two, left in p_power, from these coefficients and those of the rows, p_other_grad (None: the same).
    p_bounds [K]: what fp16_factor wants of the columns; None: nothing.
    """
    o_anchors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_lses, b_factors = load_term(p_lse, p_grad, 1.0, o_anchors, num_anchors, EXPONENTS, False)
    factored = is_factored(load_scale(scale, SCALE_IS_TENSOR), LARGEST, SHIFT)
    if SHIFT != "online":
        power = tl.where(factored, power_of(p_grad, p_other_grad, num_anchors, num_others, len(EXPONENTS)), 1.0)
        scaled = ()
        for k in tl.static_range(len(EXPONENTS)):
            scaled = scaled + (b_factors[k] * power,)
        b_factors = scaled
        if tl.program_id(0) == 0:
            tl.store(p_power, power)
    if p_bounds is not None and tl.program_id(0) == 0:
        for k in tl.static_range(len(EXPONENTS)):
            tl.store(p_bounds + k, largest(p_grad + k * num_anchors.to(tl.int64), num_anchors) * EXPONENTS[k])
    store_terms(p_terms, stride, o_anchors, b_lses, b_factors, factored, len(EXPONENTS))


@triton.jit
def load_columns(terms, j0, EXPONENTS: tl.constexpr, FACTORED: tl.constexpr, BLOCK_N: tl.constexpr):
    """`load_term` of a tile of columns, from what column_terms_kernel has made of them: terms = (p_terms, stride)."""
    p_terms, stride = terms
    b_lses, b_factors = (), ()
    p_tile = p_terms + j0 + tl.arange(0, BLOCK_N)
    for k in tl.static_range(len(EXPONENTS)):
        b_factors = b_factors + (tl.load(p_tile + k * stride),)
        if not FACTORED:
            b_lses = b_lses + (tl.load(p_tile + (len(EXPONENTS) + k) * stride),)
    return b_lses, b_factors


@triton.jit
def weighted(b_exp, b_omega):
    """b_exp times its weight; a logit that weighs nothing is not in lse and its exponential may be infinite."""
    return tl.where(b_omega > 0.0, b_exp * b_omega, 0.0)


@triton.jit
def where_kept(m_keep, b_value):
    """b_value where the pair counts, else 0; a mask of None keeps everything."""
    return b_value if m_keep is None else tl.where(m_keep, b_value, 0.0)


@triton.jit
def share(b_x, b_lse, SIGMOID: tl.constexpr):
    """What a logit weighs for anchors of these lse, or offsets -lse; both in units of log 2."""
    return sigmoid(b_x - b_lse) if SIGMOID else tl.exp2(b_x - b_lse)


@triton.jit
def weight_tile(
    b_x, row_term, col_term, b_row_omega, b_col_omega, m_keep, m_reverse,
    EXPONENTS: tl.constexpr, SIGMOID: tl.constexpr, FACTORED: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """w_ij of a tile of logits in units of log 2; an omega of None is 1, FACTORED has none."""
    b_weight = tl.zeros_like(b_x)
    if FACTORED:
        b_exp = exponentials(b_x, EXPONENTS)
    for k in tl.static_range(len(EXPONENTS)):
        if FACTORED:
            b_rows, b_columns = row_term[1][k][:, None], col_term[1][k][None, :]
            b_weight += b_exp[k] * (where_kept(m_keep, b_rows) + where_kept(m_reverse, b_columns))
        else:
            if FORWARD:
                b_exp = share(b_x * EXPONENTS[k], row_term[0][k][:, None], SIGMOID)
                b_exp = b_exp if b_row_omega is None else weighted(b_exp, b_row_omega)
                b_weight += where_kept(m_keep, b_exp * row_term[1][k][:, None])
            if REVERSE:
                b_exp = share(b_x * EXPONENTS[k], col_term[0][k][None, :], SIGMOID)
                b_exp = b_exp if b_col_omega is None else weighted(b_exp, b_col_omega)
                b_weight += where_kept(m_reverse, b_exp * col_term[1][k][None, :])
    return b_weight


@triton.jit
def fp16_factor(
    p_grad, p_bounds, o_i, num_rows,
    EXPONENTS: tl.constexpr, BLOCK_M: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Powers of two that bring every row's largest possible weight, sum_k beta_k (|a_k,i| + max_j |c_k,j|), to 2^14.

    p_bounds  [K] beta_k max_j |c_k,j|
    """
    b_bound = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.static_range(len(EXPONENTS)):
        if FORWARD:
            o_k = k * num_rows.to(tl.int64) + o_i
            b_bound += tl.abs(tl.load(p_grad + o_k, mask=o_i < num_rows, other=0.0)) * EXPONENTS[k]
        if REVERSE:
            b_bound += tl.load(p_bounds + k)
    b_exponent = FP16_EXPONENT - tl.ceil(tl.log2(b_bound))  # 100 where all is 0, as in Weights._largest_undo
    return tl.exp2(tl.minimum(tl.maximum(b_exponent, -100.0), 100.0))


@triton.jit
def sweep(
    u, d_u, v, d_v, scale, row_term, col_term, ranks, outputs, where, sizes, rules,
    EXPONENTS: tl.constexpr, SIGMOID: tl.constexpr, FACTORED: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr, BINS: tl.constexpr, TIMES_SCALE: tl.constexpr, HAS_IMAGES: tl.constexpr,
    RULES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The tile loop of the backward."""
    num_rows, num_columns = sizes.num_rows, sizes.num_columns
    p_lse, p_grad = row_term
    col_terms, p_bounds, p_power = col_term
    p_out, stride_out, p_factor = outputs
    i0, row_begin, col_begin, j_begin, j_end = where
    DTYPE: tl.constexpr = p_factor.dtype.element_ty
    D: tl.constexpr = TILE.features
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_D: tl.constexpr = TILE.chunk
    PRECISION: tl.constexpr = TILE.precision
    RESIDENT: tl.constexpr = BLOCK_D >= D
    o_i, o_d = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    anchors = load_anchors(o_i, j_begin, sizes, rules) if RULES is not None else ()
    HAS_POWER: tl.constexpr = FACTORED and p_power is not None
    power = tl.load(p_power) if HAS_POWER else 1.0
    undo_power = 1.0 / power  # exact: of a power of two
    b_row_term = load_term(p_lse, p_grad, power, o_i, num_rows, EXPONENTS, FACTORED) if FORWARD else None
    IS_FP16: tl.constexpr = u[0].dtype.element_ty == tl.float16
    if IS_FP16:
        b_factor = fp16_factor(p_grad, p_bounds, o_i, num_rows, EXPONENTS, BLOCK_M, FORWARD, REVERSE)
        b_to_fp16 = b_factor * undo_power
    if RESIDENT:
        b_u = load_operand(u, d_u, i0, num_rows, D, BLOCK_M, BLOCK_D, PRECISION)
        b_sum = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    j_masked = first_masked(i0, j_begin, sizes, BLOCK_M, BLOCK_N, HAS_IMAGES, False)
    for j_tile in range(j_begin // BLOCK_N, tl.cdiv(j_end, BLOCK_N)):
        j0 = j_tile * BLOCK_N
        o_j = j0 + tl.arange(0, BLOCK_N)
        if RESIDENT:
            b_v = load_operand(v, d_v, j0, num_columns, D, BLOCK_N, BLOCK_D, PRECISION)
            b_s = scores_of(b_u, b_v, PRECISION, DTYPE)
        else:
            b_s = scores_by_chunks(u, d_u, v, d_v, i0, j0, num_rows, num_columns, TILE)
        b_x = b_s * (scale * LOG2E)
        b_col_term = load_columns(col_terms, j0, EXPONENTS, FACTORED, BLOCK_N) if REVERSE else None
        b_row_omega, b_col_omega = None, None
        if FORWARD and BINS > 0:
            b_row_omega = rank_weights(b_s * scale, ranks[0], ranks[2], i0, num_rows, BLOCK_M, BINS, 1)
        if REVERSE and BINS > 0:
            b_col_omega = rank_weights(b_s * scale, ranks[1], ranks[2], j0, num_columns, BLOCK_N, BINS, 0)
        if RULES is not None:
            m_keep, m_reverse, anchors = keep_tile(o_i, o_j, j0 + BLOCK_N, sizes, rules, anchors, BLOCK_M, BLOCK_N,
                                                   HAS_IMAGES, RULES)  # fmt: skip
            b_weight = weight_tile(b_x, b_row_term, b_col_term, b_row_omega, b_col_omega, m_keep, m_reverse, EXPONENTS,
                                   SIGMOID, FACTORED, FORWARD, REVERSE)  # fmt: skip
        else:
            b_weight = weight_tile(b_x, b_row_term, b_col_term, b_row_omega, b_col_omega, None, None, EXPONENTS,
                                   SIGMOID, FACTORED, FORWARD, REVERSE)  # fmt: skip
            if j0 >= j_masked:
                m_keep = keep_images(o_i, o_j, sizes, HAS_IMAGES)
                b_weight = tl.where(m_keep, b_weight, 0.0)
                j_masked = first_masked(i0, j0 + BLOCK_N, sizes, BLOCK_M, BLOCK_N, HAS_IMAGES, False)
        if IS_FP16:
            b_weight = b_weight * b_to_fp16[:, None]
        elif HAS_POWER and not RESIDENT:  # what is stored is a weight
            b_weight = b_weight * undo_power
        if RESIDENT:
            b_sum = add_product(b_sum, b_weight, b_v, PRECISION, DTYPE)
        else:
            b_weight = round_to(b_weight.to(u[0].dtype.element_ty), PRECISION)
            # 64 bits up to the tile's corner only: 64-bit offsets for every weight would spill
            p_corner = p_out + (i0 - row_begin).to(tl.int64) * stride_out + (j0 - col_begin)
            o_weight = tl.arange(0, BLOCK_M)[:, None] * stride_out + tl.arange(0, BLOCK_N)[None, :]
            tl.store(p_corner + o_weight, b_weight, mask=(o_i < num_rows)[:, None] & (o_j < num_columns)[None, :])
    b_undo = tl.zeros((BLOCK_M,), DTYPE) + (scale if TIMES_SCALE else 1.0)
    if IS_FP16:
        b_undo = b_undo / b_factor
    elif HAS_POWER and RESIDENT:
        b_undo = b_undo * undo_power
    if RESIDENT:
        m_out = (o_i < num_rows)[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_i.to(tl.int64)[:, None] * stride_out + o_d[None, :], b_sum * b_undo[:, None], mask=m_out)
    elif j_begin == col_begin:
        tl.store(p_factor + o_i - row_begin, b_undo, mask=o_i < num_rows)


# vectors may be slices, aligned for some batch sizes and not for others: a ragged batch must not compile
@triton.jit(
    do_not_specialize=[*SIZES, "row_begin", "col_begin", "col_end"],
    do_not_specialize_on_alignment=["p_lse", "p_grad", "p_bounds"],
)
def row_stats_backward_kernel(
    u, d_u, v, d_v, scale, p_lse, p_grad, col_terms, p_bounds, p_power, ranks, out, p_factor,
    num_rows, num_columns, row_begin, col_begin, col_end, span,
    rules, list_groups, scorer_groups, num_scorers, num_images, shard, first_row, first_column,
    EXPONENTS: tl.constexpr, SIGMOID: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, BINS: tl.constexpr,
    TIMES_SCALE: tl.constexpr, HAS_IMAGES: tl.constexpr, RULES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, split): rows from row_begin + i * BLOCK_M, columns from col_begin + split * span, before col_end.

    u, d_u, v, d_v         operands, see `load_tile`
    p_lse, p_grad          lse and coefficients of the rows, FORWARD
    col_terms              `load_columns` of the columns, REVERSE
    p_bounds               their largest coefficients for fp16, see `fp16_factor`
    p_power                power of two in the columns' terms, see column_terms_kernel; None: 1
    ranks                  BINS > 0, each term times omega: histograms (axis, below) of the rows, of the columns,
                           and what makes a rank a weight
    out, p_factor          out = (pointer, stride of its rows): du [splits, rows, D], or with D > TILE.chunk weights
                           [rows, columns of this launch] and the factor that undoes their scaling
    sizes and rules        see pairs.py

    SHIFT: "plain" one exponential for both terms, "online" two, "device" decided by the scale tensor.
    SIGMOID: sums over pairs, SHIFT "online".
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    scale = load_scale(scale, SCALE_IS_TENSOR)
    sizes = Sizes(num_rows, num_columns, num_images, shard, first_row, first_column, list_groups, scorer_groups,
                  num_scorers)  # fmt: skip
    row_term, col_term = (p_lse, p_grad), (col_terms, p_bounds, p_power)
    p_out, stride_out = out
    if TILE.chunk >= TILE.features:
        p_out += i_split.to(tl.int64) * num_rows * TILE.features
    outputs = (p_out, stride_out, p_factor)
    i0, j_begin = row_begin + i_tile * TILE.rows, col_begin + i_split * span
    where = (i0, row_begin, col_begin, j_begin, tl.minimum(j_begin + span, col_end))
    if SHIFT == "device":
        if is_factored(scale, LARGEST, SHIFT):
            sweep(u, d_u, v, d_v, scale, row_term, col_term, ranks, outputs, where, sizes, rules, EXPONENTS, SIGMOID,
                  True, FORWARD, REVERSE, BINS, TIMES_SCALE, HAS_IMAGES, RULES, TILE)  # fmt: skip
        else:
            sweep(u, d_u, v, d_v, scale, row_term, col_term, ranks, outputs, where, sizes, rules, EXPONENTS, SIGMOID,
                  False, FORWARD, REVERSE, BINS, TIMES_SCALE, HAS_IMAGES, RULES, TILE)  # fmt: skip
    else:
        sweep(u, d_u, v, d_v, scale, row_term, col_term, ranks, outputs, where, sizes, rules, EXPONENTS, SIGMOID,
              SHIFT == "plain", FORWARD, REVERSE, BINS, TIMES_SCALE, HAS_IMAGES, RULES, TILE)  # fmt: skip
