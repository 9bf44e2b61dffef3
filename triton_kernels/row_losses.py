"""The built-in row losses with their derivatives, after the sweep's partial results are merged and before the losses
are reduced: one kernel. csrc/row_losses.h explains the formulas.

A row without negatives has loss 0 and no derivatives, NaN if its positive is not finite. Sums run in a fixed order:
lanes over blocks of rows, then over lanes, then over programs.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import online_lse
from .merge import merged
from .row_stats_backward import is_factored, store_terms
from .scores import LOG2E, load_scale

OVERWHELMED = tl.constexpr(60.0)  # e^60 times the sum itself: far below the floor, and finite in float32


class Formula(NamedTuple):
    """The constant FORMULA: a name of csrc/row_losses.h and its parameters.

    by_first, by_second  dS/dlse_0 and dS/dlse_1 of what the formula takes, see `row_loss`
    """

    name: str
    tau_plus: float
    log_tau_plus: float
    by_first: float
    by_second: float


@triton.jit
def log1p(b_x):
    """log(1 + x) for x >= 0 to a few ulps: the rounding of 1 + x is divided out (Kahan)."""
    b_sum = 1.0 + b_x
    b_kept = b_sum - 1.0
    return tl.where(b_kept == 0.0, b_x, tl.log(b_sum) * (b_x / tl.where(b_kept == 0.0, 1.0, b_kept)))


@triton.jit
def debias(b_sum, b_pos, b_log_count, scale, FORMULA: tl.constexpr):
    """log Ng, its derivatives by log sum, pos and scale, and where the floor replaced it."""
    b_floor = b_log_count - scale
    b_shift = tl.where(b_sum > b_floor, b_sum, b_floor)
    b_exp = tl.exp(b_sum - b_shift)
    b_hidden = tl.zeros_like(b_exp)
    if FORMULA.tau_plus > 0:
        b_exponent = b_pos + b_log_count + FORMULA.log_tau_plus - b_shift
        b_hidden = tl.exp(tl.where(b_exponent > OVERWHELMED, OVERWHELMED, b_exponent))
    b_raw = (b_exp - b_hidden) / (1 - FORMULA.tau_plus)
    # written so that NaN is not "clamped": it must reach the loss
    m_clamped = (b_raw < tl.exp(b_floor - b_shift)) | (b_raw <= 0)
    b_raw = tl.where(m_clamped, 1.0, b_raw)
    b_inverse = tl.where(m_clamped, 0.0, 1.0 / ((1 - FORMULA.tau_plus) * b_raw))
    b_log = tl.where(m_clamped, b_floor, b_shift + tl.log(b_raw))
    b_by_sum = tl.where(m_clamped, 0.0, b_exp * b_inverse)
    b_by_pos = tl.where(m_clamped, 0.0, -b_hidden * b_inverse)
    return b_log, b_by_sum, b_by_pos, tl.where(m_clamped, -1.0, 0.0).to(b_sum.dtype), m_clamped


@triton.jit
def row_loss(b_lse, b_pos, b_count, scale, FORMULA: tl.constexpr):
    """(loss, dL/dS, dL/dpos, dL/dscale, clamped) of rows with negatives; S is lse or log count + lse_1 - lse_0."""
    b_zero = tl.zeros_like(b_pos)
    m_clamped = b_zero > 1.0
    if FORMULA.name == "decoupled":
        return b_lse[0] - b_pos, b_zero + 1.0, b_zero - 1.0, b_zero, m_clamped
    else:
        b_log, b_by_sum, b_by_pos, b_by_scale = b_lse[0], b_zero + 1.0, b_zero, b_zero
        if FORMULA.name != "infonce":
            b_log_count = tl.log(b_count)
            if FORMULA.name == "hard_negative":
                b_log = b_log_count + b_lse[1] - b_lse[0]
            b_log, b_by_sum, b_by_pos, b_by_scale, m_clamped = debias(b_log, b_pos, b_log_count, scale, FORMULA)
        b_gap = b_log - b_pos
        b_small = tl.exp(-tl.abs(b_gap))  # softplus and its derivative, exact on both tails
        b_loss = log1p(b_small) + tl.where(b_gap > 0, b_gap, 0.0)
        b_loss = tl.where(b_gap == b_gap, b_loss, b_gap)
        b_pull = tl.where(b_gap > 0, 1.0, b_small) / (1.0 + b_small)
        return b_loss, b_pull * b_by_sum, b_pull * (b_by_pos - 1.0), b_pull * b_by_scale, m_clamped


@triton.jit(
    do_not_specialize=[
        "num_row_partials", "row_of_tiles", "num_col_partials", "col_of_tiles", "first_tile", "num_anchors",
        "num_images", "count", "stride_terms", "span",
    ]
)  # fmt: skip
def row_losses_kernel(
    p_rows, num_row_partials, row_of_tiles, p_columns, num_col_partials, col_of_tiles, first_tile,
    p_cosine, scale, p_lse, p_coefficients, p_terms, p_bounds, p_losses, p_sums, p_clamped, num_anchors, num_images,
    count, stride_terms, span,
    EXPONENTS: tl.constexpr, PARTS: tl.constexpr, TRIANGLE: tl.constexpr, FORMULA: tl.constexpr, SIDES: tl.constexpr,
    MEAN: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, LARGEST: tl.constexpr, BACKWARD_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program p: anchors p * span .. of each side; their lse, coefficients, share of the loss and clamped share.

    p_rows, p_columns  partial results of the first and of the second side, see `merged`
    p_terms            [sides, 2 K, stride_terms] what the backward reads of its columns, see column_terms_kernel
    p_bounds           [sides, K] zeros, raised to what fp16_factor wants of the columns; None: nothing
    p_losses           [sides, anchors] every loss, or None where only the sums are wanted
    count              negatives of every anchor
    """
    scale = load_scale(scale, SCALE_IS_TENSOR)
    DTYPE: tl.constexpr = p_lse.dtype.element_ty
    NUM_LSE: tl.constexpr = len(EXPONENTS)
    length = num_anchors.to(tl.int64)
    num_losses = SIDES * length
    b_total, b_on_floor = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for i_side in tl.static_range(SIDES):
        if i_side == 0:
            partials = (p_rows, num_row_partials, row_of_tiles, first_tile)
        else:
            partials = (p_columns, num_col_partials, col_of_tiles, first_tile)
        for start in range(0, span, BLOCK):
            o_anchor = tl.program_id(0) * span + start + tl.arange(0, BLOCK)
            m_anchor = o_anchor < num_anchors
            state, _ = merged(partials, o_anchor, num_anchors, EXPONENTS, PARTS, TRIANGLE, BLOCK, AT_ONCE)
            b_lse = ()
            for k in tl.static_range(NUM_LSE):
                b_lse = b_lse + (online_lse.finish(state, k, EXPONENTS),)
                tl.store(p_lse + (i_side * NUM_LSE + k) * length + o_anchor, b_lse[k], mask=m_anchor)
            b_pos = tl.load(p_cosine + o_anchor % num_images, mask=m_anchor, other=0.0) * scale
            b_count = tl.zeros((BLOCK,), DTYPE) + count
            m_full = b_count > 0
            b_loss, b_by_sum, b_by_pos, b_by_scale, m_clamped = row_loss(
                b_lse, b_pos, tl.where(m_full, b_count, 1.0), scale, FORMULA
            )
            b_loss = tl.where(m_full, b_loss, 0.0 * b_pos)
            b_by_lse = (tl.where(m_full & m_anchor, b_by_sum * FORMULA.by_first, 0.0),)
            if NUM_LSE == 2:
                b_by_lse = b_by_lse + (tl.where(m_full & m_anchor, b_by_sum * FORMULA.by_second, 0.0),)
            p_out = p_coefficients + i_side * (NUM_LSE + 2) * length + o_anchor
            b_lses, b_factors = (), ()
            for k in tl.static_range(NUM_LSE):
                tl.store(p_out + k * length, b_by_lse[k], mask=m_anchor)
                b_empty = (b_lse[k] == float("-inf")) | (o_anchor >= num_anchors)
                b_lses = b_lses + (tl.where(b_empty, float("inf"), b_lse[k] * LOG2E),)
                b_factors = b_factors + (b_by_lse[k] * EXPONENTS[k],)
                if p_bounds is not None:  # a maximum is the same in any order
                    tl.atomic_max(p_bounds + i_side * NUM_LSE + k, tl.max(tl.abs(b_factors[k]), 0), sem="relaxed")
            p_side = p_terms + i_side * 2 * NUM_LSE * stride_terms.to(tl.int64)
            factored = is_factored(scale, LARGEST, BACKWARD_SHIFT)
            store_terms(p_side, stride_terms, o_anchor, b_lses, b_factors, factored, NUM_LSE)
            tl.store(p_out + NUM_LSE * length, tl.where(m_full, b_by_pos, 0.0), mask=m_anchor)
            tl.store(p_out + (NUM_LSE + 1) * length, tl.where(m_full, b_by_scale, 0.0), mask=m_anchor)
            if p_losses is not None:
                tl.store(p_losses + i_side * length + o_anchor, b_loss, mask=m_anchor)
            b_total += tl.where(m_anchor, b_loss, 0.0)
            b_on_floor += tl.where(m_anchor & m_full & m_clamped, 1.0, 0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(b_total, 0) / num_losses if MEAN else tl.sum(b_total, 0))
    tl.store(p_clamped + tl.program_id(0), tl.sum(b_on_floor, 0) / num_losses)


@triton.jit(do_not_specialize=["num_parts"])
def add_parts_kernel(p_sums, p_clamped, p_loss, p_share, num_parts, BLOCK: tl.constexpr):
    """The parts of several programs of row_losses_kernel, summed in one."""
    DTYPE: tl.constexpr = p_sums.dtype.element_ty
    b_loss, b_share = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, num_parts, BLOCK):
        o_part = start + tl.arange(0, BLOCK)
        b_loss += tl.load(p_sums + o_part, mask=o_part < num_parts, other=0.0)
        b_share += tl.load(p_clamped + o_part, mask=o_part < num_parts, other=0.0)
    tl.store(p_loss, tl.sum(b_loss, 0))
    tl.store(p_share, tl.sum(b_share, 0))
