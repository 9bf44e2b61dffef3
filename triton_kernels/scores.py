"""A tile of inner products <u_i, v_j>.

Up to 256 features a row tile fits a program, is loaded once and meets one column tile after the other. Beyond, both
tiles come in chunks of features and the product accumulates.
"""

# ruff: noqa: RUF005
# Triton has no starred tuples

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """The constant TILE of the sweeps: `rows` x `columns` logits, vectors of `features` in chunks of `chunk`.

    precision  `input_precision` of the products; "fp16x3": of fp16 in two parts, `load_operand`
    """

    features: int
    rows: int
    columns: int
    chunk: int
    precision: str


@triton.jit
def round_to(b_x, PRECISION: tl.constexpr):
    """b_x as an operand of a product: tensor cores cut float32 off after 11 bits, half an ulp too small on average."""
    if PRECISION == "tf32":
        b_bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [b_x], tl.int32, is_pure=True, pack=1)
        return b_bits.to(tl.float32, bitcast=True)
    else:
        return b_x


@triton.jit
def load_rows(p_x, o_rows, o_features, num_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[o_rows, o_features], zero outside; rows stride in 64 bits."""
    m_x = (o_rows < num_rows)[:, None]
    if D % BLOCK_D != 0:
        m_x = m_x & (o_features < D)[None, :]
    return tl.load(p_x + o_rows.to(tl.int64)[:, None] * stride + o_features[None, :], mask=m_x, other=0.0)


@triton.jit
def load_tile(
    x, d_x, first, first_feature, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """BLOCK rows of x from `first` on, BLOCK_D features from `first_feature` on, zero outside.

    x    (pointer, stride of the rows)
    d_x  a tensor descriptor, by which Hopper's copy engine brings the tile without an address or a mask in the program;
         None on other devices and where rows are not aligned to 16 bytes
    """
    if d_x is not None:
        return d_x.load([first, first_feature])
    else:
        o_rows, o_features = first + tl.arange(0, BLOCK), first_feature + tl.arange(0, BLOCK_D)
        return load_rows(x[0], o_rows, o_features, num_rows, x[1], D, BLOCK_D)


@triton.jit
def load_operand(x, d_x, first, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """BLOCK whole rows of x in their parts: a float32 row split in two stands there as (rounded, what that lost)."""
    b_x = (load_tile(x, d_x, first, 0, num_rows, D, BLOCK, BLOCK_D),)
    if PRECISION == "fp16x3":
        b_x = b_x + (load_tile(x, d_x, first, D, num_rows, D, BLOCK, BLOCK_D),)
    return b_x


@triton.jit
def scores_of(b_u, b_v, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """<u_i, v_j> of rows and columns in their parts; of the four products of two parts the smallest is rounding."""
    if PRECISION == "fp16x3":
        b_s = tl.dot(b_u[1], tl.trans(b_v[0]), out_dtype=DTYPE)
        b_s = tl.dot(b_u[0], tl.trans(b_v[1]), b_s, out_dtype=DTYPE)
        return tl.dot(b_u[0], tl.trans(b_v[0]), b_s, out_dtype=DTYPE)
    else:
        return tl.dot(b_u[0], tl.trans(b_v[0]), input_precision=PRECISION, out_dtype=DTYPE)


@triton.jit
def add_product(b_sum, b_weight, b_v, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """b_sum plus weights times columns in their parts."""
    if PRECISION == "fp16x3":
        b_high = b_weight.to(b_v[0].dtype)
        b_low = (b_weight - b_high.to(b_weight.dtype)).to(b_v[0].dtype)
        b_sum = tl.dot(b_low, b_v[0], b_sum, out_dtype=DTYPE)
        b_sum = tl.dot(b_high, b_v[1], b_sum, out_dtype=DTYPE)
        return tl.dot(b_high, b_v[0], b_sum, out_dtype=DTYPE)
    else:
        b_weight = round_to(b_weight.to(b_v[0].dtype), PRECISION)
        return tl.dot(b_weight, b_v[0], b_sum, input_precision=PRECISION, out_dtype=DTYPE)


@triton.jit
def scores_by_chunks(u, d_u, v, d_v, i0, j0, num_rows, num_columns, TILE: tl.constexpr):
    """<u_i, v_j> for the tile of pairs from (i0, j0) on, features in chunks."""
    D: tl.constexpr = TILE.features  # in a loop Triton 3.6 takes fields for tensors
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_D: tl.constexpr = TILE.chunk
    PRECISION: tl.constexpr = TILE.precision
    b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if u[0].dtype.element_ty == tl.float64 else tl.float32)
    for o_d in range(0, D, BLOCK_D):
        b_u = load_tile(u, d_u, i0, o_d, num_rows, D, BLOCK_M, BLOCK_D)
        b_v = load_tile(v, d_v, j0, o_d, num_columns, D, BLOCK_N, BLOCK_D)
        b_s = tl.dot(b_u, tl.trans(b_v), b_s, input_precision=PRECISION, out_dtype=b_s.dtype)
    return b_s


@triton.jit
def chunked_scores(
    u, v, o_i, o_j, num_rows, num_columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<u_i, v_j> for a tile of any rows and columns, features in chunks of BLOCK_D; u, v = (pointer, stride)."""
    b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if u[0].dtype.element_ty == tl.float64 else tl.float32)
    for o_d in range(0, D, BLOCK_D):
        o_features = o_d + tl.arange(0, BLOCK_D)
        b_u = load_rows(u[0], o_i, o_features, num_rows, u[1], D, BLOCK_D)
        b_v = load_rows(v[0], o_j, o_features, num_columns, v[1], D, BLOCK_D)
        b_s = tl.dot(b_u, tl.trans(b_v), b_s, input_precision=PRECISION, out_dtype=b_s.dtype)
    return b_s


@triton.jit
def largest_scores(
    p_rows, p_columns, o_i, o_j, num_rows, num_columns, groups, num_scorers,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    SCORERS_ARE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """max_s <scorers[s, i mod groups], features_j>, or with the roles swapped; NaN where any of them is."""
    b_largest = tl.full((BLOCK_M, BLOCK_N), float("-inf"), p_rows.dtype.element_ty)
    rows, columns = (p_rows, D), (p_columns, D)
    num_scorer_rows = num_scorers * groups
    for i_scorer in range(num_scorers):
        if SCORERS_ARE_COLUMNS:
            b_s = chunked_scores(rows, columns, o_i, i_scorer * groups + o_j % groups, num_rows, num_scorer_rows, D,
                                 BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)  # fmt: skip
        else:
            b_s = chunked_scores(rows, columns, i_scorer * groups + o_i % groups, o_j, num_scorer_rows, num_columns, D,
                                 BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)  # fmt: skip
        b_largest = tl.where((b_s > b_largest) | (b_s != b_s), b_s, b_largest)
    return b_largest


@triton.jit
def load_scale(scale, SCALE_IS_TENSOR: tl.constexpr):
    """1/temperature, given as a number or as a tensor that only the device reads."""
    if SCALE_IS_TENSOR:
        return tl.load(scale)
    else:
        return scale
