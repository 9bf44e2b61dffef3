"""The short road of the `torch` backend: a small problem in a few tensor operations each way, its matrix kept.

    forward   unit rows -> `kept.forward` -> row losses and their derivatives by hand -> reduction
    backward  derivatives times the upstream gradient -> `kept.backward` -> positives, normalisation

Plain functions with the arguments of short_road.py; what the backward starts from is what `kept` keeps. The composed
road does the same sums for problems of any size, with autograd through every vector between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...numerics import finite_norm, round_operand, scaled_norm, softplus, stats_dtype
from ...problem.pairs import Pairs
from ...problem.problem import Problem, Statistics
from ...problem.short_road import WholeLossOps
from . import kept


def whole_loss(dtype: torch.dtype, numbers: int) -> WholeLossOps | None:
    """The operators of the short road, where a matrix of so many numbers may be kept."""
    return _OPERATORS if kept.fits(numbers, stats_dtype(dtype)) else None


def _forward(
    z1, z2, scale, scale_value, layout, normalize, formula, parameters, exponents, reduction
) -> tuple[Tensor, ...]:
    scale = scale_value if scale is None else scale.detach()
    z = torch.cat([z1, z2]).to(stats_dtype(z1.dtype))
    lengths = z.new_empty(0)
    if normalize:
        u, lengths = _unit(z)
    else:
        u = z - (z - z)  # an infinity is NaN (numerics.operand)
    u = round_operand(u, z1.dtype)
    problem = _problem(u, scale, layout, normalize, exponents, len(z1))
    cosine = (u[: len(z1)] * u[len(z1) : 2 * len(z1)]).sum(1)
    sides, count = 2 if layout == "symmetric" else 1, problem.pairs.num_columns - problem.pairs.num_rows // len(z1)
    pos = (cosine * scale).repeat(problem.pairs.num_rows // len(z1) * sides)
    made = kept.forward(problem, columns=sides == 2, means=False, maximum=False)
    assert made is not None and isinstance(made.stats, Statistics)  # whole_loss asked
    lse = made.stats.lse if sides == 1 else torch.cat([made.stats.lse, made.stats.col_lse], 1)
    if count:
        losses, *derivatives, clamped = _row_losses(formula, parameters, lse, pos, count, scale)
    else:
        losses, derivatives, clamped = 0.0 * pos, [torch.zeros_like(lse), *torch.zeros_like(pos.repeat(2, 1))], None
    loss = losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
    share = losses.new_zeros(()) if clamped is None else clamped.to(losses.dtype).mean()
    return loss, u, lengths, cosine, *derivatives, *made.blocks, *made.sums, share


def _unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows as `numerics.normalize` makes them, and what every row was multiplied by."""
    norm = finite_norm(z)
    if norm is not None:
        return z / norm, norm.reciprocal()
    shrink, norm = scaled_norm(z)
    return z * shrink / norm, shrink / norm


def _row_losses(
    formula: str, parameters: tuple[float, ...], lse: Tensor, pos: Tensor, count: int, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Losses [R], their derivatives by lse [K, R], pos and scale [R], and which are on the floor; csrc/row_losses.h."""
    zero = torch.zeros_like(pos)
    if formula == "decoupled":
        return lse[0] - pos, torch.ones_like(lse), zero - 1, zero, None
    by_pos: float | Tensor = -1.0
    log_sum, by_sum, by_scale, clamped = lse[0], None, zero, None
    if formula == "hard_negative":
        log_sum = math.log(count) + (lse[1] - lse[0])
    if formula != "infonce":
        tau_plus, log_floor, log_raw, clamped = parameters[0], math.log(count) - scale, log_sum, None
        if tau_plus > 0:  # Ng = sum (1 - hidden) / (1 - tau_plus), hidden = tau_plus N e^pos / sum
            hidden = torch.exp((pos - log_sum + (math.log(count) + math.log(tau_plus))).clamp(max=1.0))
            clamped = hidden >= 1  # not NaN: it must reach the loss
            rest = (1 - hidden).masked_fill(clamped, 1.0)
            log_raw = log_sum + rest.log() - math.log1p(-tau_plus)
        below = log_raw < log_floor
        clamped = below if clamped is None else clamped | below
        log_sum = torch.where(clamped, log_floor, log_raw)
        by_sum = (torch.ones_like(pos) if tau_plus == 0 else 1 / rest).masked_fill(clamped, 0.0)
        by_pos = -1 - hidden * by_sum if tau_plus > 0 else by_pos
        by_scale = -clamped.to(zero.dtype) if isinstance(scale, Tensor) else zero
    gap = log_sum - pos
    pull = torch.sigmoid(gap)
    by_lse = pull if by_sum is None else pull * by_sum
    if formula == "hard_negative":
        beta, detach = parameters[1], parameters[2]
        by_lse = torch.stack([zero, by_lse / (1 + beta)] if detach else [-by_lse, by_lse])
    else:
        by_lse = by_lse[None]
    return softplus(gap), by_lse, pull * by_pos, by_scale if by_scale is zero else pull * by_scale, clamped


def _backward(
    z1, z2, scale, scale_value, layout, normalize, exponents, reduction,
    u, lengths, cosine, by_lse, by_pos, by_scale, *more,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *matrix, grad_loss, need_scale = more
    scale = scale_value if scale is None else scale
    images, one_set = len(z1), layout == "two_view"
    grad = grad_loss / len(by_pos) if reduction == "mean" else grad_loss
    grad_lse, grad_col_lse = by_lse * grad, None
    if layout == "symmetric":
        grad_lse, grad_col_lse = grad_lse[:, :images], grad_lse[:, images:]
    rows, columns = (u, None) if one_set else (u[:images], u[images:])
    du, dv = kept.backward(rows, columns, scale, exponents, grad_lse, grad_col_lse, True, True, *matrix)
    assert du is not None
    by_cosine = (by_pos * grad).view(-1, images).sum(0)
    dscale = u.new_empty(0)
    if need_scale:
        dscale = (rows * du).sum() / (2 * scale if one_set else scale)
        dscale = dscale + (by_cosine * cosine).sum() + (by_scale * grad).sum()
    first, second = (du[:images], du[images:]) if dv is None else (du, dv)
    pull = (by_cosine * scale)[:, None]
    du = torch.cat([
        first + pull * u[images : 2 * images], second[:images] + pull * u[:images], second[images:]
    ])  # fmt: skip
    if normalize:
        unit = u if u.dtype == z1.dtype else _unit(torch.cat([z1, z2]).to(u.dtype))[0]  # before it was rounded
        du = torch.addcmul(du, unit, (unit * du).sum(1, keepdim=True), value=-1) * lengths
    return du[:images].to(z1.dtype), du[images:].to(z2.dtype), dscale


def _problem(u: Tensor, scale, layout: str, unit: bool, exponents, images: int) -> Problem:
    rows, columns = (u, None) if layout == "two_view" else (u[:images], u[images:])
    pairs = Pairs(len(rows), len(rows if columns is None else columns), num_images=images, device=u.device)
    return Problem(rows, columns, scale, tuple(exponents), pairs, unit, u.dtype)


_OPERATORS = WholeLossOps(_forward, _backward)
