"""Sums of exp2(beta_k x) over a stream of tiles, in four moves: init, update, merge, finish.

x are logits in units of log 2, -inf where a pair is ignored. The state is (shift, sums): for each anchor the sums of
exp2(beta_k (x - shift)). ONLINE keeps the running maximum as the shift, one for all exponents because all are positive.
Otherwise the shift is 0: with unit vectors |x| <= log2(e)/temperature, and while beta_k |x| <= MAX_PLAIN neither an
exponential nor a sum of 2^27 of them leaves float32. Then no maximum, no rescaling and no shuffles are needed and the
same exponential serves rows and columns. For exponent 1 that is a temperature of 0.0145 or more. An offset of 100 would
reach 0.0128, but rounds exponents near 100: 3e-6 of error in every exponential at any temperature.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LN2

MAX_PLAIN = tl.constexpr(100.0)


@triton.jit
def init(NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, ONLINE: tl.constexpr):
    """The state of anchors that have seen nothing."""
    b_shift = tl.full((BLOCK,), float("-inf") if ONLINE else 0.0, DTYPE)
    return b_shift, (tl.zeros((BLOCK,), DTYPE),) * NUM_SUMS


@triton.jit
def finite(b_shift):
    """The shift to subtract: nothing kept so far must give exp2(-inf - 0) = 0, not NaN."""
    return tl.where(b_shift == float("-inf"), 0.0, b_shift)


@triton.jit
def exponentials(b_x, EXPONENTS: tl.constexpr):
    """exp2(beta_k x) for every exponent; twice the first is its square, which costs a product instead."""
    b_first = tl.exp2(b_x if EXPONENTS[0] == 1.0 else b_x * EXPONENTS[0])
    b_all = (b_first,)
    for k in tl.static_range(1, len(EXPONENTS)):
        if EXPONENTS[k] == 2 * EXPONENTS[0]:
            b_all = b_all + (b_first * b_first,)
        else:
            b_all = b_all + (tl.exp2(b_x * EXPONENTS[k]),)
    return b_all


@triton.jit
def update(state, b_x, EXPONENTS: tl.constexpr, AXIS: tl.constexpr, ONLINE: tl.constexpr):
    """Take in a tile, anchors along the other axis; also returns its exponentials and what the old ones shrank by."""
    b_shift, b_sums = state
    b_rescale = (1.0,) * len(EXPONENTS)
    if ONLINE:
        b_new = tl.maximum(b_shift, tl.max(b_x, AXIS))
        b_rescale = exponentials(b_shift - finite(b_new), EXPONENTS)
        b_x = b_x - tl.expand_dims(finite(b_new), AXIS)
        b_shift = b_new
    b_exp = exponentials(b_x, EXPONENTS)
    b_new_sums = ()
    for k in tl.static_range(len(EXPONENTS)):
        b_new_sums = b_new_sums + (b_sums[k] * b_rescale[k] + tl.sum(b_exp[k], AXIS),)
    return (b_shift, b_new_sums), b_exp, b_rescale


@triton.jit
def merge(state, others, EXPONENTS: tl.constexpr, ONLINE: tl.constexpr):
    """The state of the union of disjoint streams: one [anchors], the others side by side [streams, anchors].

    Also returns what the sums shrank by: the one's [anchors], the others' [streams, anchors].
    """
    b_shift, b_sums = state
    b_other_shifts, b_other_sums = others
    b_here = (1.0,) * len(EXPONENTS)
    b_there = (1.0,) * len(EXPONENTS)
    if ONLINE:
        b_new = tl.maximum(b_shift, tl.max(b_other_shifts, 0))
        b_here = exponentials(b_shift - finite(b_new), EXPONENTS)
        b_there = exponentials(b_other_shifts - finite(b_new)[None, :], EXPONENTS)
        b_shift = b_new
    b_merged = ()
    for k in tl.static_range(len(EXPONENTS)):
        b_merged = b_merged + (b_sums[k] * b_here[k] + tl.sum(b_other_sums[k] * b_there[k], 0),)
    return (b_shift, b_merged), b_here, b_there


@triton.jit
def finish(state, K: tl.constexpr, EXPONENTS: tl.constexpr):
    """log sum exp(beta_k s) in nats; -inf for an anchor without negatives."""
    b_shift, b_sums = state
    return (tl.log2(b_sums[K]) + EXPONENTS[K] * finite(b_shift)) * LN2
