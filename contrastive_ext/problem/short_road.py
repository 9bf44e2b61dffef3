"""What a backend offers for the short road (whole_loss.py): two operators with these schemas and shapes.

    whole_loss_forward_<backend>     z1, z2, call, formula -> loss and what the backward starts from
    whole_loss_backward_<backend>    the same call, that state, dL/dloss -> dz1, dz2, dscale

operands      [B + M, D] rows of z1, then of z2: of unit length with `normalize`, rounded to the dtype of the inputs
norm          [B + M] lengths of the rows of z1 and z2, infinite for a row that counts as zero
lse           [sides, K, anchors]; "symmetric" has two sides, rows and columns, the other layouts one
coefficients  [sides, K + 2, anchors] derivatives of every row's unreduced loss by lse_k, pos and scale
clamped       [] share of the rows on the debiasing floor
The backend chooses the dtype of the operands and may keep more beside the coefficients; everything else is of the
statistics dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import stats_dtype

_CALL = "Tensor z1, Tensor z2, Tensor? scale, float scale_value, str layout, bool normalize"
FORWARD_SCHEMA = (
    f"({_CALL}, str formula, float[] parameters, float[] exponents, str reduction) -> "
    "(Tensor loss, Tensor operands, Tensor norm, Tensor lse, Tensor coefficients, Tensor clamped)"
)
BACKWARD_SCHEMA = (
    f"({_CALL}, float[] exponents, str reduction, Tensor operands, Tensor norm, Tensor lse, "
    "Tensor coefficients, Tensor grad_loss, bool need_scale) -> (Tensor dz1, Tensor dz2, Tensor dscale)"
)


class WholeLossOps(NamedTuple):
    """A backend's operators of the short road, and where they are written in Python what they call, `directly`."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    directly: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, Tensor, Tensor]]] | None = None


def forward_shapes(
    z1, z2, scale, scale_value, layout, normalize, name, parameters, exponents, reduction
) -> tuple[Tensor, ...]:
    """Shapes of the forward operator's results."""
    dtype, sides, k = stats_dtype(z1.dtype), 2 if layout == "symmetric" else 1, len(exponents)
    anchors = 2 * z1.shape[0] if layout == "two_view" else z1.shape[0]
    rows = z1.shape[0] + z2.shape[0]
    return (
        z1.new_empty((sides * anchors,) if reduction == "none" else (), dtype=dtype),
        z1.new_empty((rows, z1.shape[1]), dtype=dtype),
        z1.new_empty((rows,), dtype=dtype),
        z1.new_empty((sides, k, anchors), dtype=dtype),
        z1.new_empty((sides, k + 2, anchors), dtype=dtype),
        z1.new_empty((), dtype=dtype),
    )


def backward_shapes(z1, z2, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the backward operator's results."""
    dscale = z1.new_empty(() if rest[-1] else (0,), dtype=stats_dtype(z1.dtype))
    return torch.empty_like(z1), torch.empty_like(z2), dscale
