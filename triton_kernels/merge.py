"""Partial results: how they are stored, and the kernels that add them in a fixed order.

A partial result of anchors is [parts, anchors]: shift, one sum per exponent, count, largest and sum of logits; the
constant PARTS says which of them there are. Row partials differ in their split of the columns,
column partials in their tile of rows. Several are read at once: a sweep of 65,536 rows leaves 512 of them, and one
after the other they would wait for memory longer than the sweep takes.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import online_lse
from .scores import LN2


class Parts(NamedTuple):
    """The constant PARTS: how many parts a partial result has, and which of the optional ones.

    shift        absent where it is known to be 0
    count        only where rules beside the images' decide
    diagnostics  largest and sum of logits
    """

    number: int
    shift: bool
    count: bool
    diagnostics: bool


@triton.jit
def pack(state, counts, PARTS: tl.constexpr):
    """The parts that are stored, in their order."""
    b_shift, b_parts = state
    b_count, b_largest, b_total = counts
    if PARTS.shift:
        b_parts = (b_shift,) + b_parts
    if PARTS.count:
        b_parts = b_parts + (b_count,)
    if PARTS.diagnostics:
        b_parts = b_parts + (b_largest, b_total)
    return b_parts


@triton.jit
def store_parts(p_parts, o_anchors, num_anchors, b_parts):
    """One row of the partial result per part."""
    for k in tl.static_range(len(b_parts)):
        tl.store(p_parts + k * num_anchors.to(tl.int64) + o_anchors, b_parts[k], mask=o_anchors < num_anchors)


@triton.jit
def load_states(p_parts, m_parts, length, NUM_SUMS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """The log-sum-exp states of partial results, [partials, anchors], from pointers to their first parts."""
    b_shifts = tl.zeros(m_parts.shape, p_parts.dtype.element_ty)
    if HAS_SHIFT:
        b_shifts = tl.load(p_parts, mask=m_parts, other=float("-inf"))
        p_parts += length
    b_sums = ()
    for k in tl.static_range(NUM_SUMS):
        b_sums = b_sums + (tl.load(p_parts + k * length, mask=m_parts, other=0.0),)
    return b_shifts, b_sums


@triton.jit
def merged(
    partials, o_anchors, num_anchors,
    EXPONENTS: tl.constexpr, PARTS: tl.constexpr, TRIANGLE: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """(state, counts) of a block of anchors, the sum of `partials` = (pointer, number, of_tiles, first_tile).

    Partials from `of_tiles` on are of one tile of rows each, the first of tile `first_tile`. TRIANGLE > 0: of that many
    rows, and about anchors beyond the tile only; the others' numbers were never written.
    """
    p_partials, num_partials, of_tiles, first_tile = partials
    DTYPE: tl.constexpr = p_partials.dtype.element_ty
    NUM_SUMS: tl.constexpr = len(EXPONENTS)
    length = num_anchors.to(tl.int64)
    state = online_lse.init(NUM_SUMS, BLOCK, DTYPE, PARTS.shift)
    b_zero = tl.zeros((BLOCK,), DTYPE)
    b_count, b_largest, b_total = b_zero, b_zero + float("-inf"), b_zero
    if TRIANGLE > 0:
        tiles_above = tl.maximum(tl.max(o_anchors, 0) // TRIANGLE - first_tile, 0)
        num_partials = tl.minimum(num_partials, of_tiles + tiles_above)
    for start in range(0, num_partials, AT_ONCE):
        o_partials = start + tl.arange(0, AT_ONCE)
        m_parts = (o_partials < num_partials)[:, None] & (o_anchors < num_anchors)[None, :]
        if TRIANGLE > 0:
            o_stop = tl.where(o_partials < of_tiles, 0, (first_tile + o_partials - of_tiles + 1) * TRIANGLE)
            m_parts = m_parts & (o_stop[:, None] <= o_anchors[None, :])
        p_parts = p_partials + o_partials.to(tl.int64)[:, None] * (PARTS.number * length) + o_anchors[None, :]
        state, _, _ = online_lse.merge(
            state, load_states(p_parts, m_parts, length, NUM_SUMS, PARTS.shift), EXPONENTS, PARTS.shift
        )
        p_parts += (NUM_SUMS + (1 if PARTS.shift else 0)) * length
        if PARTS.count:
            b_count += tl.sum(tl.load(p_parts, mask=m_parts, other=0.0), 0)
            p_parts += length
        if PARTS.diagnostics:
            b_largest = tl.maximum(b_largest, tl.max(tl.load(p_parts, mask=m_parts, other=float("-inf")), 0))
            b_total += tl.sum(tl.load(p_parts + length, mask=m_parts, other=0.0), 0)
    return state, (b_count, b_largest, b_total)


@triton.jit(
    do_not_specialize=[
        "num_partials", "of_tiles", "first_tile", "num_anchors", "num_candidates", "same_image", "first", "shard"
    ]
)  # fmt: skip
def merge_kernel(
    p_partials, num_partials, of_tiles, first_tile, p_lse, p_aux, num_anchors, num_candidates, same_image, first, shard,
    EXPONENTS: tl.constexpr, PARTS: tl.constexpr, TRIANGLE: tl.constexpr, MAXIMUM: tl.constexpr, FINISH: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The partials of a block of anchors -> lse and aux, or (FINISH=False) one partial result in p_lse."""
    o_anchors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_anchors = o_anchors < num_anchors
    NUM_SUMS: tl.constexpr = len(EXPONENTS)
    length = num_anchors.to(tl.int64)
    partials = (p_partials, num_partials, of_tiles, first_tile)
    state, counts = merged(partials, o_anchors, num_anchors, EXPONENTS, PARTS, TRIANGLE, BLOCK, AT_ONCE)
    b_count, b_largest, b_total = counts
    if FINISH:
        if not PARTS.count:
            m_shard = (o_anchors >= first) & (o_anchors < first + shard)
            b_count += num_candidates - tl.where(m_shard, same_image, 0)
        NUM_LSE: tl.constexpr = NUM_SUMS - 1 if PARTS.diagnostics else NUM_SUMS
        for k in tl.static_range(NUM_LSE):
            tl.store(p_lse + k * length + o_anchors, online_lse.finish(state, k, EXPONENTS), mask=m_anchors)
        tl.store(p_aux + o_anchors, b_count, mask=m_anchors)
        if PARTS.diagnostics or MAXIMUM:
            b_largest = b_largest if PARTS.diagnostics else state[0]  # the running maximum: MAXIMUM implies a shift
            # a maximum may pass over NaN, a sum cannot
            b_largest = tl.where(state[1][0] == state[1][0], b_largest * LN2, state[1][0])
            tl.store(p_aux + length + o_anchors, b_largest, mask=m_anchors)
        if PARTS.diagnostics:
            tl.store(p_aux + 2 * length + o_anchors, b_total * LN2, mask=m_anchors)
            tl.store(p_aux + 3 * length + o_anchors, online_lse.finish(state, NUM_LSE, EXPONENTS), mask=m_anchors)
    else:
        store_parts(p_lse, o_anchors, num_anchors, pack(state, counts, PARTS))


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def merge_means_kernel(
    p_partials, p_means, p_out, num_splits, num_rows,
    D: tl.constexpr, EXPONENTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Unnormalised means of the splits [splits, rows, D] -> the softmax-weighted mean of all columns."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    NUM_SUMS: tl.constexpr = len(EXPONENTS)
    step = num_rows.to(tl.int64) * PARTS.number
    o_mean = o_i.to(tl.int64)[:, None] * D + o_d[None, :]
    m_mean = (o_i < num_rows)[:, None] & (o_d < D)[None, :]
    state = online_lse.init(NUM_SUMS, BLOCK, DTYPE, True)
    b_mean = tl.zeros((BLOCK, BLOCK_D), DTYPE)
    for i in range(num_splits):
        split = load_states((p_partials + i * step + o_i)[None, :], (o_i < num_rows)[None, :], num_rows, NUM_SUMS, True)
        state, b_here, b_there = online_lse.merge(state, split, EXPONENTS, True)
        b_split = tl.load(p_means + i * (num_rows.to(tl.int64) * D) + o_mean, mask=m_mean, other=0.0)
        b_mean = b_mean * b_here[0][:, None] + b_split * tl.trans(b_there[0])
    b_sum = state[1][0]
    tl.store(p_out + o_mean, b_mean / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None], mask=m_mean)
