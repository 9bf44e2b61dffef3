"""Softplus of a tile and its derivative, for losses that are sums over pairs; x are in units of log 2.

With y = exp(-|x|) in [0, 1] nothing overflows and small terms keep their digits: softplus(x) = max(x, 0) + log(1 + y),
sigmoid(x) = 1/(1 + y) or y/(1 + y). log(1 + y) = 2 atanh(t), t = y/(2 + y) <= 1/3, by its series, since a logarithm of
1 + y has lost a small y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LN2

# Terms t^(2k + 1)/(2k + 1) of atanh: the first one left out is below a quarter of an ulp at t = 1/3.
TERMS_OF_FLOAT32, TERMS_OF_FLOAT64 = tl.constexpr(8), tl.constexpr(17)


@triton.jit
def update(state, b_x):
    """Take in a tile of rows: `online_lse.update` with sums of softplus (nats) and sigmoid; -inf adds nothing."""
    b_shift, b_sums = state
    b_value, b_slope = softplus_and_slope(b_x)
    return b_shift, (b_sums[0] + tl.sum(b_value, 1), b_sums[1] + tl.sum(b_slope, 1))


@triton.jit
def softplus_and_slope(b_x):
    """log(1 + e^x) in nats, and its derivative by x in nats."""
    b_y = tl.exp2(-tl.abs(b_x))
    b_inverse = reciprocal(1.0 + b_y)
    b_value = tl.maximum(b_x, 0.0) * LN2 + twice_atanh(b_y * reciprocal(2.0 + b_y))
    return b_value, tl.where(b_x > 0.0, 1.0, b_y) * b_inverse


@triton.jit
def twice_atanh(b_t):
    """Of t in [0, 1/3]."""
    TERMS: tl.constexpr = TERMS_OF_FLOAT64 if b_t.dtype == tl.float64 else TERMS_OF_FLOAT32
    b_square = b_t * b_t
    b_sum = b_square * (2.0 / (2 * TERMS - 1)) + 2.0 / (2 * TERMS - 3)
    for k in tl.static_range(TERMS - 3, -1, -1):
        b_sum = b_sum * b_square + 2.0 / (2 * k + 1)
    return b_t * b_sum


@triton.jit
def sigmoid(b_x):
    """1/(1 + e^-x)."""
    return reciprocal(1.0 + tl.exp2(-b_x))


@triton.jit
def reciprocal(b_x):
    """1/x of x >= 1, to two ulps; a division, which takes smaller x too, is a seventh of the forward's instructions."""
    b_root = tl.rsqrt(b_x)
    return b_root * b_root
