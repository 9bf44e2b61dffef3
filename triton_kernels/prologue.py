"""What happens to a batch before and after the sweeps, one kernel each way; csrc/cpu/prologue.h is the CPU's.

    forward   z1, z2 -> unit rows in the operand dtype, their lengths, cosines of the positives
    backward  gradients of the unit rows and of the positives' logits -> dz1, dz2 in the dtype of the input

A program owns a block of images: the rows of both views, as whole rows, so norms and cosines need no second pass. The
backward adds up the splits of the sweep and multiplies by the upstream gradient on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import load_rows, load_scale, round_to

# rows of at most this length count as zero: their squares underflow (numerics.normalize)
SHORTEST_FP32 = tl.constexpr(2.0**-63)
SHORTEST_FP64 = tl.constexpr(2.0**-511)
# what a row whose squares overflow is multiplied by before it is squared
SHRINK_FP32 = tl.constexpr(2.0**-96)
SHRINK_FP64 = tl.constexpr(2.0**-768)


@triton.jit
def divide(b_x, b_y):
    """b_x / b_y, correctly rounded: times a reciprocal, a row of one feature would not be exactly 1 or -1."""
    return b_x / b_y if b_x.dtype == tl.float64 else tl.div_rn(b_x, b_y)


@triton.jit
def to_unit_length(b_z):
    """Rows divided by their lengths, and these, infinite for a row that counts as zero."""
    IS_FP64: tl.constexpr = b_z.dtype == tl.float64
    b_square = tl.sum(b_z * b_z, 1)
    b_shrink = tl.where(b_square == float("inf"), SHRINK_FP64 if IS_FP64 else SHRINK_FP32, 1.0).to(b_z.dtype)
    b_z = b_z * b_shrink[:, None]
    b_square = tl.sum(b_z * b_z, 1)
    b_norm = tl.sqrt(b_square) if IS_FP64 else tl.sqrt_rn(b_square)
    b_norm = tl.where(b_norm <= (SHORTEST_FP64 if IS_FP64 else SHORTEST_FP32), float("inf"), b_norm)
    return divide(b_z, tl.broadcast_to(b_norm[:, None], b_z.shape)), divide(b_norm, b_shrink)


@triton.jit
def prepare(
    p_z, stride, p_operands, p_norm, o_i, o_d, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operands of a block of rows, stored and returned in the dtype that computes."""
    DTYPE: tl.constexpr = p_norm.dtype.element_ty
    b_z = load_rows(p_z, o_i, o_d, rows, stride, D, BLOCK_D).to(DTYPE)
    if NORMALIZE:
        b_z, b_norm = to_unit_length(b_z)
        tl.store(p_norm + o_i, b_norm, mask=o_i < rows)
    else:
        b_z = b_z - (b_z - b_z)  # an infinity is NaN (numerics.operand)
    b_operand = b_z.to(p_operands.dtype.element_ty)
    m_row = (o_i < rows)[:, None] & (o_d < D)[None, :]
    p_rows = p_operands + o_i.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_rows, round_to(b_operand, PRECISION), mask=m_row)  # only products are in TF32, no positive
    return b_operand.to(DTYPE)


@triton.jit(do_not_specialize=["num_images", "num_columns"])
def prologue_kernel(
    p_z1, p_z2, p_operands, p_norm, p_cosine, p_bounds, num_images, num_columns, stride_1, stride_2,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Program i: rows i * BLOCK .. of z1 [num_images, D] and of z2 [num_columns, D], num_columns >= num_images.

    p_bounds  [BOUNDS] set to zero for row_losses_kernel; None: nothing
    """
    if p_bounds is not None and tl.program_id(0) == 0:
        for k in tl.static_range(BOUNDS):
            tl.store(p_bounds + k, 0.0)
    o_i, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    b_u = prepare(p_z1, stride_1, p_operands, p_norm, o_i, o_d, num_images, D, BLOCK_D, NORMALIZE, PRECISION)
    p_second = p_operands + num_images.to(tl.int64) * D
    b_v = prepare(p_z2, stride_2, p_second, p_norm + num_images, o_i, o_d, num_columns, D, BLOCK_D, NORMALIZE,
                  PRECISION)  # fmt: skip
    tl.store(p_cosine + o_i, tl.sum(b_u * b_v, 1), mask=o_i < num_images)


@triton.jit(do_not_specialize=["num_rows"])
def unit_rows_kernel(
    p_z, p_unit, p_norm, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr
):
    """Program i: rows i * BLOCK .. of z [num_rows, D] divided by their lengths and rounded to DTYPE, the lengths."""
    o_i, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    b_unit, b_norm = to_unit_length(load_rows(p_z, o_i, o_d, num_rows, D, D, BLOCK_D).to(p_norm.dtype.element_ty))
    b_unit = b_unit.to(DTYPE).to(p_unit.dtype.element_ty)
    m_row = (o_i < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_unit + o_i.to(tl.int64)[:, None] * D + o_d[None, :], b_unit, mask=m_row)
    tl.store(p_norm + o_i, b_norm, mask=o_i < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def unit_rows_backward_kernel(
    p_z, p_norm, p_gradient, p_dz, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Program i: dz of the rows i * BLOCK .. from the gradient of the unit rows."""
    o_i, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    b_gradient = load_rows(p_gradient, o_i, o_d, num_rows, D, D, BLOCK_D)
    through_normalisation(p_z, D, p_norm, p_dz, b_gradient, o_i, o_d, num_rows, D, BLOCK_D, True)


@triton.jit
def load_operand(
    p_operands, p_z, stride, p_norm, o_i, o_d, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `prepare` returned of a block of rows."""
    DTYPE: tl.constexpr = p_norm.dtype.element_ty
    if PRECISION != "tf32":
        return load_rows(p_operands, o_i, o_d, rows, D, D, BLOCK_D).to(DTYPE)
    else:
        b_z = load_rows(p_z, o_i, o_d, rows, stride, D, BLOCK_D).to(DTYPE)
        if NORMALIZE:
            b_norm = tl.load(p_norm + o_i, mask=o_i < rows, other=1.0)[:, None]
            b_z = divide(b_z, tl.broadcast_to(b_norm, b_z.shape))
        return b_z


@triton.jit
def add_splits(
    p_splits, num_splits, step, o_i, o_d, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The gradient of a block of operands: the sum over the splits of the sweep, in their order."""
    b_sum = tl.zeros((BLOCK, BLOCK_D), p_splits.dtype.element_ty)
    for _ in range(num_splits):
        b_sum += load_rows(p_splits, o_i, o_d, rows, D, D, BLOCK_D)
        p_splits += step
    return b_sum


@triton.jit
def through_normalisation(
    p_z, stride, p_norm, p_dz, b_gradient, o_i, o_d, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Store dz of a block of rows; the gradient passed the rounding unchanged."""
    if NORMALIZE:
        b_norm = tl.load(p_norm + o_i, mask=o_i < rows, other=1.0)[:, None]
        b_norm = tl.broadcast_to(b_norm, b_gradient.shape)
        b_unit = divide(load_rows(p_z, o_i, o_d, rows, stride, D, BLOCK_D).to(b_gradient.dtype), b_norm)
        b_gradient = divide(b_gradient - b_unit * tl.sum(b_unit * b_gradient, 1)[:, None], b_norm)
    m_row = (o_i < rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_dz + o_i.to(tl.int64)[:, None] * D + o_d[None, :], b_gradient.to(p_dz.dtype.element_ty), mask=m_row)


@triton.jit
def load_of_image(p_coefficient, o_i, num_images, second):
    """A coefficient of an image: that of its anchor, and of its second anchor at offset `second` (0: it has none)."""
    b_sum = tl.load(p_coefficient + o_i, mask=o_i < num_images, other=0.0)
    num_second = tl.where(second > 0, num_images, 0)
    return b_sum + tl.load(p_coefficient + second + o_i, mask=o_i < num_second, other=0.0)


@triton.jit(
    do_not_specialize=[
        "splits_1", "splits_2", "step_1", "step_2", "num_images", "num_columns", "second", "num_rows",
    ],
    do_not_specialize_on_alignment=["p_by_pos", "p_by_scale", "p_du", "p_dv"],
)  # fmt: skip
def prologue_backward_kernel(
    p_z1, p_z2, p_operands, p_norm, p_by_pos, p_by_scale, p_du, p_dv, p_upstream, scale, p_dz1, p_dz2, p_dscale,
    splits_1, splits_2, step_1, step_2, num_images, num_columns, second, stride_1, stride_2, num_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, ONE_SET: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i: dz of the rows i * BLOCK .. of both views; p_dscale None: not wanted, else one part per program.

    p_upstream  dL/dloss, the mean over `num_rows` losses (1: a sum); None: the coefficients carry it
    second      from an image's first anchor to its second in p_by_pos and p_by_scale, 0 if it has one
    """
    DTYPE: tl.constexpr = p_norm.dtype.element_ty
    o_i, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    scale = load_scale(scale, SCALE_IS_TENSOR)
    upstream = divide(tl.load(p_upstream), num_rows.to(DTYPE)) if p_upstream is not None else 1.0
    b_by_pos = load_of_image(p_by_pos, o_i, num_images, second)
    p_second = p_operands + num_images.to(tl.int64) * D
    b_u = load_operand(p_operands, p_z1, stride_1, p_norm, o_i, o_d, num_images, D, BLOCK_D, NORMALIZE, PRECISION)
    b_v = load_operand(p_second, p_z2, stride_2, p_norm + num_images, o_i, o_d, num_images, D, BLOCK_D, NORMALIZE,
                       PRECISION)  # fmt: skip
    b_du = add_splits(p_du, splits_1, step_1, o_i, o_d, num_images, D, BLOCK, BLOCK_D)
    b_dv = add_splits(p_dv, splits_2, step_2, o_i, o_d, num_columns, D, BLOCK, BLOCK_D)
    if p_dscale is not None:
        b_swept = tl.sum(b_u * b_du, 1)
        if ONE_SET:
            b_swept = 0.5 * (b_swept + tl.sum(b_v * b_dv, 1))
        b_scale = b_by_pos * tl.sum(b_u * b_v, 1) + load_of_image(p_by_scale, o_i, num_images, second)
        b_scale += divide(b_swept, tl.zeros_like(b_swept) + scale)
        tl.store(p_dscale + tl.program_id(0), tl.sum(b_scale, 0) * upstream)
    b_by_cosine = (b_by_pos * scale)[:, None]
    b_du, b_dv = (b_du + b_by_cosine * b_v) * upstream, (b_dv + b_by_cosine * b_u) * upstream
    through_normalisation(p_z1, stride_1, p_norm, p_dz1, b_du, o_i, o_d, num_images, D, BLOCK_D, NORMALIZE)
    through_normalisation(
        p_z2, stride_2, p_norm + num_images, p_dz2, b_dv, o_i, o_d, num_columns, D, BLOCK_D, NORMALIZE
    )
