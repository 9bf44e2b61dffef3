"""Sums over pairs of the `triton` backend: one sweep over tiles; the gradient is that of the row statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...problem.problem import PairSums, Problem
from . import launch, replay
from . import pairs as triton_pairs
from .gradient import Term, total
from .row_stats import gradients_of, prepared


def forward(problem: Problem, offset: Tensor, sign: float) -> PairSums:
    """Sums over the selected columns of every row; see `PairSums`."""
    problem, *_ = prepared(_signed(problem, sign))
    pairs, (u, v) = problem.pairs, launch.operands(problem)
    mask = triton_pairs.costliest_rule(pairs)
    counted = mask != "images"
    config = launch.config_of("forward", u, mask, products=problem.products, sums=True)
    tiles, programs = launch.cdiv(len(u), config.block_m), 2 * launch.processors(u.device)
    splits, span = launch.split(tiles, len(v), config.block_n, programs)
    parts = launch.kernels().merge.Parts(2 + counted, shift=False, count=counted, diagnostics=False)
    partials = problem.u.new_empty(splits, parts.number, len(u))
    scale, scale_is_tensor = launch.scale_argument(problem)
    rules = triton_pairs.arguments(pairs, *triton_pairs.sides(problem, u, v), row_anchors=True, col_anchors=False)
    with launch.on_device(u.device):
        replay.start(
            launch.kernels().pair_sums.pair_sums_kernel, (tiles, splits),
            *launch.operand_arguments(config, u, v, problem.products), scale, offset, partials, span=span, **rules,
            SCALE_IS_TENSOR=scale_is_tensor, PARTS=parts, **launch.tile_arguments(config, u, problem.products),
        )  # fmt: skip
        sums = list(total(partials))
    if not counted:
        same_image = pairs.num_rows // pairs.num_images if pairs.num_images else 0
        sums.append(torch.full_like(sums[0], len(v) - same_image))
    return PairSums(*sums)


def backward(
    problem: Problem, offset: Tensor, sign: float, grad_sum: Tensor, *, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv, an empty tensor where not needed."""
    # an lse of -inf would be that of a row without columns
    lse = -offset.clamp(max=torch.finfo(offset.dtype).max / 2)
    term = Term(lse[None], grad_sum.contiguous()[None], sigmoid=True)
    return gradients_of(_signed(problem, sign), term, None, need_u, need_v)


def _signed(problem: Problem, sign: float) -> Problem:
    """Logits times the sign; kernels take any scale."""
    return problem if sign == 1 else replace(problem, scale=sign * problem.scale)
