"""The short road of the `triton` backend: few launches, because those are what a small batch costs.

Forward: prologue, sweep, row losses, which merge the sweep's partial results first and reduce at the end; beyond 4096
anchors a second launch completes the reduction. Backward: sweep, for two sets one of each side, prologue backward,
where the sweep's splits are summed and the upstream gradient enters: coefficients are those of the unreduced losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...numerics import stats_dtype
from ...problem.pairs import Pairs
from ...problem.problem import Problem
from ...problem.short_road import BACKWARD_SCHEMA, FORWARD_SCHEMA, WholeLossOps, backward_shapes, forward_shapes
from . import launch, replay
from .forward import Forward
from .gradient import TERMS_BLOCK, Term, gradients, shift_of_weights
from .unit_rows import prologue_block

ANCHORS_OF_PROGRAM = 4096  # one program reduces small batches; of larger ones each of many programs leaves a part
BLOCK_OF_ONE, BLOCK_OF_MANY = 1024, 128  # anchors of a block
READ_AT_ONCE = 8192  # partial results times anchors


def whole_loss(dtype: torch.dtype, numbers: int) -> WholeLossOps | None:
    """The operators of the short road; the interpreter truncates to bf16 where a GPU rounds."""
    return None if dtype == torch.bfloat16 and launch.interpreted() else _OPERATORS


def _forward(z1, z2, scale, scale_value, layout, normalize, formula, parameters, exponents, reduction):
    options = scale_value, layout, normalize, formula, tuple(parameters), tuple(exponents), reduction
    if launch.interpreted():
        return _launch_forward(z1, z2, scale, *options)
    return _forward_calls((z1, z2, scale), options)


def _launch_forward(
    z1, z2, scale, scale_value, layout, normalize, formula, parameters, exponents, reduction
) -> tuple[Tensor, ...]:
    images, columns, features = len(z1), len(z2), z1.shape[1]
    like = z1.new_empty(0, dtype=stats_dtype(z1.dtype))
    operands, norm = z1.new_empty(images + columns, features), like.new_empty(images + columns)
    problem = _problem(operands, scale, scale_value, layout, normalize, exponents, images)
    cosine, clamped = like.new_empty(images), like.new_empty(())
    sides, anchors, k = 2 if layout == "symmetric" else 1, problem.pairs.num_rows, len(exponents)
    lse, saved = like.new_empty(sides, k, anchors), like.new_empty(_saved(sides, k, anchors)[0])
    coefficients, terms, bounds_of_fp16 = _parts_of_saved(saved, sides, k, anchors)
    bounds = bounds_of_fp16 if operands.dtype == torch.float16 else None
    losses = like.new_empty(sides * anchors) if reduction == "none" else None
    count = 2 * images - 2 if problem.one_set else columns - 1  # negatives of every anchor
    with launch.on_device(z1.device):
        block, block_d = prologue_block(features)
        replay.start(
            launch.kernels().prologue.prologue_kernel, (launch.cdiv(columns, block),),
            z1, z2, operands, norm, cosine, bounds, images, columns, z1.stride(0), z2.stride(0), D=features,
            BLOCK=block, BLOCK_D=block_d, NORMALIZE=normalize, PRECISION=launch.precision(operands),
            BOUNDS=sides * k, enable_fp_fusion=True,
        )  # fmt: skip
        sweep = Forward(problem, columns=layout == "symmetric")
        row_partials, col_partials, _ = sweep.partials()
        col_partials = col_partials or row_partials
        span, block = blocks(anchors)
        parts = launch.cdiv(anchors, span)
        loss = like.new_empty(())
        sums, shares = (loss, clamped) if parts == 1 else (like.new_empty(parts), like.new_empty(parts))
        scale_argument, scale_is_tensor = launch.scale_argument(problem)
        replay.start(
            launch.kernels().row_losses.row_losses_kernel, (parts,),
            *row_partials.arguments, *col_partials.arguments, col_partials.first_tile, cosine, scale_argument, lse,
            coefficients, terms, bounds, losses, sums, shares, anchors, images, count, terms.stride(1), span,
            EXPONENTS=problem.exponents, PARTS=sweep.parts, FORMULA=_formula(formula, parameters),
            TRIANGLE=row_partials.triangle, SIDES=sides, MEAN=reduction == "mean", SCALE_IS_TENSOR=scale_is_tensor,
            LARGEST=max(exponents), BACKWARD_SHIFT=shift_of_weights(problem, problem.exponents, layout != "one_way"),
            BLOCK=block, AT_ONCE=READ_AT_ONCE // block, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        if parts > 1:
            replay.start(
                launch.kernels().row_losses.add_parts_kernel,
                (1,),
                sums,
                shares,
                loss,
                clamped,
                parts,
                BLOCK=1024,
                enable_fp_fusion=True,
            )
    return (loss if losses is None else losses), operands, norm, lse, saved, clamped


def _backward(
    z1, z2, scale, scale_value, layout, normalize, exponents, reduction,
    operands, norm, lse, saved, grad_loss, need_scale,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = scale_value, layout, normalize, tuple(exponents), reduction, need_scale
    tensors = z1, z2, scale, operands, norm, lse, saved, grad_loss
    interpreted = launch.interpreted()
    dz1, dz2, dscale = _launch_backward(*tensors, *options) if interpreted else _backward_calls(tensors, options)
    return dz1, dz2, dscale.sum() if need_scale else dscale


def _launch_backward(
    z1,
    z2,
    scale,
    operands,
    norm,
    lse,
    saved,
    grad_loss,
    scale_value,
    layout,
    normalize,
    exponents,
    reduction,
    need_scale,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz1, dz2 and, if wanted, parts of dscale."""
    images, columns, features, k = len(z1), len(z2), z1.shape[1], len(exponents)
    problem = _problem(operands, scale, scale_value, layout, normalize, exponents, images)
    sides, _, anchors = lse.shape
    coefficients, as_columns, bounds = _parts_of_saved(saved, sides, k, anchors)
    of_side = bounds if operands.dtype == torch.float16 else (None,) * sides
    terms = [
        Term(lse[side], coefficients[side, :k], columns=as_columns[side], bounds=of_side[side]) for side in range(sides)
    ]
    if reduction == "none":  # the gradient of each loss may be small: the sweep makes its terms anew
        coefficients = coefficients * grad_loss.view(sides, 1, anchors)
        terms = [Term(lse[side], coefficients[side, :k]) for side in range(sides)]
    dz1, dz2 = torch.empty_like(z1), torch.empty_like(z2)
    with launch.on_device(z1.device):
        du, dv = gradients(problem, terms[0], terms[1] if sides == 2 else None)
        assert du is not None
        dv = du[:, images:] if dv is None else dv
        block, block_d = prologue_block(features)
        programs = launch.cdiv(columns, block)
        dscale = norm.new_empty(programs if need_scale else 0)
        scale_argument, scale_is_tensor = launch.scale_argument(problem)
        second = {"two_view": images, "one_way": 0, "symmetric": (k + 2) * anchors}[layout]
        replay.start(
            launch.kernels().prologue.prologue_backward_kernel, (programs,),
            z1, z2, operands, norm, coefficients[0, k], coefficients[0, k + 1], du, dv,
            None if reduction == "none" else grad_loss, scale_argument, dz1, dz2, dscale if need_scale else None,
            len(du), len(dv),
            du.stride(0), dv.stride(0), images, columns, second, z1.stride(0), z2.stride(0),
            sides * anchors if reduction == "mean" else 1, D=features, BLOCK=block, BLOCK_D=block_d,
            NORMALIZE=normalize, ONE_SET=problem.one_set, SCALE_IS_TENSOR=scale_is_tensor,
            PRECISION=launch.precision(operands), enable_fp_fusion=True,
        )  # fmt: skip
        return dz1, dz2, dscale


def _saved(sides: int, k: int, anchors: int) -> tuple[int, int, int]:
    """Numbers that the forward keeps beside lse, of them coefficients, and the length of a padded vector of terms."""
    length = launch.cdiv(anchors, TERMS_BLOCK) * TERMS_BLOCK
    coefficients = launch.cdiv(sides * (k + 2) * anchors, TERMS_BLOCK) * TERMS_BLOCK  # terms begin aligned
    return coefficients + sides * 2 * k * length + sides * k, coefficients, length


def _parts_of_saved(saved: Tensor, sides: int, k: int, anchors: int) -> tuple[Tensor, Tensor, Tensor]:
    """[sides, k + 2, anchors] derivatives of the unreduced losses, [sides, 2 k, padded] terms of the columns, and
    [sides, k] bounds on coefficients, of fp16 only.
    """
    number, begin, length = _saved(sides, k, anchors)
    bounds = number - sides * k
    coefficients = saved[: sides * (k + 2) * anchors].view(sides, k + 2, anchors)
    return coefficients, saved[begin:bounds].view(sides, 2 * k, length), saved[bounds:].view(sides, k)


def _forward_shapes(z1, z2, scale, scale_value, layout, normalize, name, parameters, exponents, reduction):
    """Those of problem/short_road.py, but for what is kept beside lse."""
    call = (z1, z2, scale, scale_value, layout, normalize, name, parameters, exponents, reduction)
    loss, operands, norm, lse, _, clamped = forward_shapes(*call)
    return loss, operands, norm, lse, lse.new_empty(_saved(*lse.shape)[0]), clamped


def _problem(operands: Tensor, scale, scale_value, layout: str, normalize: bool, exponents, images: int) -> Problem:
    one_set = layout == "two_view"
    u, v = (operands, None) if one_set else (operands[:images], operands[images:])
    pairs = Pairs(len(u), len(u if v is None else v), num_images=images, device=operands.device)
    return Problem(u, v, scale_value if scale is None else scale, tuple(exponents), pairs, normalize, operands.dtype)


def blocks(anchors: int) -> tuple[int, int]:
    """Anchors of a program of the row losses, and of a block."""
    if anchors <= ANCHORS_OF_PROGRAM:
        return launch.cdiv(anchors, BLOCK_OF_ONE) * BLOCK_OF_ONE, BLOCK_OF_ONE
    return BLOCK_OF_MANY, BLOCK_OF_MANY


def _formula(name: str, parameters: list[float]):
    """The kernel's constant for a formula; csrc/row_losses.h says what parameters it has."""
    tau_plus, beta, detach_weights = (*parameters, 0.0, 0.0, 0.0)[:3]
    first, second = 1.0, 0.0
    if name == "hard_negative":
        first, second = (0.0, 1.0 / (1.0 + beta)) if detach_weights else (-1.0, 1.0)
    log_tau_plus = math.log(tau_plus) if tau_plus > 0 else 0.0
    return launch.kernels().row_losses.Formula(name, tau_plus, log_tau_plus, first, second)


_forward_calls, _backward_calls = replay.Replayed(_launch_forward), replay.Replayed(_launch_backward)
_library = torch.library.Library("contrastive_ext", "FRAGMENT")
_library.define(f"whole_loss_forward_triton{FORWARD_SCHEMA}")
_library.define(f"whole_loss_backward_triton{BACKWARD_SCHEMA}")
_library.impl("whole_loss_forward_triton", _forward, "CompositeExplicitAutograd")
_library.impl("whole_loss_backward_triton", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("contrastive_ext::whole_loss_forward_triton", _forward_shapes, lib=_library)
torch.library.register_fake("contrastive_ext::whole_loss_backward_triton", backward_shapes, lib=_library)
_OPERATORS = WholeLossOps(
    torch.ops.contrastive_ext.whole_loss_forward_triton.default,
    torch.ops.contrastive_ext.whole_loss_backward_triton.default,
    directly=(_forward, _backward),
)
