"""The built-in row losses with their derivatives, and the reduction; csrc/row_losses.h explains the formulas.

A row without negatives has loss 0 and no derivatives, NaN if its positive is not finite. Sums run in a fixed order:
lanes over blocks of rows, then over lanes, then over programs.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .scores import load_scale

OVERWHELMED = tl.constexpr(60.0)  # e^60 times the sum itself: far below the floor, and finite in float32


@triton.jit
def log1p(b_x):
    """log(1 + x) for x >= 0 to a few ulps: the rounding of 1 + x is divided out (Kahan)."""
    b_sum = 1.0 + b_x
    b_kept = b_sum - 1.0
    return tl.where(b_kept == 0.0, b_x, tl.log(b_sum) * (b_x / tl.where(b_kept == 0.0, 1.0, b_kept)))


@triton.jit
def debias(b_sum, b_pos, b_log_count, scale, TAU_PLUS: tl.constexpr, LOG_TAU_PLUS: tl.constexpr):
    """log Ng, its derivatives by log sum, pos and scale, and where the floor replaced it."""
    b_floor = b_log_count - scale
    b_shift = tl.where(b_sum > b_floor, b_sum, b_floor)
    b_exp = tl.exp(b_sum - b_shift)
    b_hidden = tl.zeros_like(b_exp)
    if TAU_PLUS > 0:
        b_exponent = b_pos + b_log_count + LOG_TAU_PLUS - b_shift
        b_hidden = tl.exp(tl.where(b_exponent > OVERWHELMED, OVERWHELMED, b_exponent))
    b_raw = (b_exp - b_hidden) / (1 - TAU_PLUS)
    # written so that NaN is not "clamped": it must reach the loss
    m_clamped = (b_raw < tl.exp(b_floor - b_shift)) | (b_raw <= 0)
    b_raw = tl.where(m_clamped, 1.0, b_raw)
    b_inverse = tl.where(m_clamped, 0.0, 1.0 / ((1 - TAU_PLUS) * b_raw))
    b_log = tl.where(m_clamped, b_floor, b_shift + tl.log(b_raw))
    b_by_sum = tl.where(m_clamped, 0.0, b_exp * b_inverse)
    b_by_pos = tl.where(m_clamped, 0.0, -b_hidden * b_inverse)
    return b_log, b_by_sum, b_by_pos, tl.where(m_clamped, -1.0, 0.0).to(b_sum.dtype), m_clamped


@triton.jit
def row_loss(
    b_lse, b_pos, b_count, scale, FORMULA: tl.constexpr, TAU_PLUS: tl.constexpr, LOG_TAU_PLUS: tl.constexpr
):  # fmt: skip
    """(loss, dL/dS, dL/dpos, dL/dscale, clamped) of rows with negatives; S is lse or log count + lse_1 - lse_0."""
    b_zero = tl.zeros_like(b_pos)
    m_clamped = b_zero > 1.0
    if FORMULA == "decoupled":
        return b_lse[0] - b_pos, b_zero + 1.0, b_zero - 1.0, b_zero, m_clamped
    else:
        b_log, b_by_sum, b_by_pos, b_by_scale = b_lse[0], b_zero + 1.0, b_zero, b_zero
        if FORMULA != "infonce":
            b_log_count = tl.log(b_count)
            if FORMULA == "hard_negative":
                b_log = b_log_count + b_lse[1] - b_lse[0]
            b_log, b_by_sum, b_by_pos, b_by_scale, m_clamped = debias(
                b_log, b_pos, b_log_count, scale, TAU_PLUS, LOG_TAU_PLUS
            )
        b_gap = b_log - b_pos
        b_small = tl.exp(-tl.abs(b_gap))  # softplus and its derivative, exact on both tails
        b_loss = log1p(b_small) + tl.where(b_gap > 0, b_gap, 0.0)
        b_loss = tl.where(b_gap == b_gap, b_loss, b_gap)
        b_pull = tl.where(b_gap > 0, 1.0, b_small) / (1.0 + b_small)
        return b_loss, b_pull * b_by_sum, b_pull * (b_by_pos - 1.0), b_pull * b_by_scale, m_clamped


@triton.jit(do_not_specialize=["num_rows", "num_anchors", "num_images"])
def row_losses_kernel(
    p_lse, p_count, p_cosine, scale, p_coefficients, p_losses, p_sums, p_clamped, num_rows, num_anchors, num_images,
    FORMULA: tl.constexpr, TAU_PLUS: tl.constexpr, LOG_TAU_PLUS: tl.constexpr, BY_FIRST: tl.constexpr,
    BY_SECOND: tl.constexpr, NUM_LSE: tl.constexpr, MEAN: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p: rows p * SPAN .. of the sides one after the other; its share of the loss, its clamped share.

    p_losses  [rows] every loss, or None where only the sums are wanted
    BY_FIRST, BY_SECOND  dS/dlse_0 and dS/dlse_1
    """
    scale = load_scale(scale, SCALE_IS_TENSOR)
    DTYPE: tl.constexpr = p_lse.dtype.element_ty
    b_total, b_on_floor = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, SPAN, BLOCK):
        o_row = tl.program_id(0) * SPAN + start + tl.arange(0, BLOCK)
        m_row = o_row < num_rows
        o_side, o_anchor = (o_row // num_anchors).to(tl.int64), o_row % num_anchors
        b_lse = ()
        for k in tl.static_range(NUM_LSE):
            b_lse = b_lse + (tl.load(p_lse + (o_side * NUM_LSE + k) * num_anchors + o_anchor, mask=m_row, other=0.0),)
        b_count = tl.load(p_count + o_row, mask=m_row, other=0.0)
        b_pos = tl.load(p_cosine + o_anchor % num_images, mask=m_row, other=0.0) * scale
        m_full = b_count > 0
        b_loss, b_by_sum, b_by_pos, b_by_scale, m_clamped = row_loss(
            b_lse, b_pos, tl.where(m_full, b_count, 1.0), scale, FORMULA, TAU_PLUS, LOG_TAU_PLUS
        )
        b_loss = tl.where(m_full, b_loss, 0.0 * b_pos)
        p_out = p_coefficients + o_side * (NUM_LSE + 2) * num_anchors + o_anchor
        tl.store(p_out, tl.where(m_full, b_by_sum * BY_FIRST, 0.0), mask=m_row)
        if NUM_LSE == 2:
            tl.store(p_out + num_anchors, tl.where(m_full, b_by_sum * BY_SECOND, 0.0), mask=m_row)
        tl.store(p_out + NUM_LSE * num_anchors, tl.where(m_full, b_by_pos, 0.0), mask=m_row)
        tl.store(p_out + (NUM_LSE + 1) * num_anchors, tl.where(m_full, b_by_scale, 0.0), mask=m_row)
        if p_losses is not None:
            tl.store(p_losses + o_row, b_loss, mask=m_row)
        b_total += tl.where(m_row, b_loss, 0.0)
        b_on_floor += tl.where(m_row & m_full & m_clamped, 1.0, 0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(b_total, 0) / num_rows if MEAN else tl.sum(b_total, 0))
    tl.store(p_clamped + tl.program_id(0), tl.sum(b_on_floor, 0) / num_rows)


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
