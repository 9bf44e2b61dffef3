"""Rows of unit length by the kernels of triton_kernels/prologue.py, as operators, which autograd can batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics import stats_dtype
from ..backend import UnitRows
from . import launch, replay

PROLOGUE_ELEMENTS = 2048  # of a block of rows: 16 for a thread and array


def prologue_block(features: int) -> tuple[int, int]:
    """Rows of a program of the prologue, and features with their padding."""
    block_d = launch.feature_block(features)
    return max(1, PROLOGUE_ELEMENTS // block_d), block_d


def unit_rows(dtype: torch.dtype) -> UnitRows | None:
    """Its functions for rows of unit length; the interpreter truncates to bf16 where a GPU rounds."""
    return None if dtype == torch.bfloat16 and launch.interpreted() else _FUNCTIONS


def _forward(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    unit, norm = _launch_forward(z, dtype) if launch.interpreted() else _forward_calls((z,), (dtype,))
    return unit, norm


def _backward(z: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    (dz,) = _launch_backward(z, norm, grad) if launch.interpreted() else _backward_calls((z, norm, grad), ())
    return dz


def _launch_forward(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, features = z.shape
    unit = z.new_empty(z.shape, dtype=stats_dtype(z.dtype))
    norm = unit.new_empty(rows)
    block, block_d = prologue_block(features)
    kernels = launch.kernels().prologue
    with launch.on_device(z.device):
        replay.start(
            kernels.unit_rows_kernel, (launch.cdiv(rows, block),), z, unit, norm, rows, D=features, BLOCK=block,
            BLOCK_D=block_d, DTYPE=getattr(kernels.tl, str(dtype).removeprefix("torch.")), enable_fp_fusion=True,
        )  # fmt: skip
    return unit, norm


def _launch_backward(z: Tensor, norm: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    dz = torch.empty_like(z)
    block, block_d = prologue_block(z.shape[1])
    with launch.on_device(z.device):
        replay.start(
            launch.kernels().prologue.unit_rows_backward_kernel, (launch.cdiv(len(z), block),), z, norm, grad, dz,
            len(z), D=z.shape[1], BLOCK=block, BLOCK_D=block_d, enable_fp_fusion=True,
        )  # fmt: skip
    return (dz,)


_forward_calls, _backward_calls = replay.Replayed(_launch_forward), replay.Replayed(_launch_backward)
_library = torch.library.Library("contrastive_ext", "FRAGMENT")
_library.define("unit_rows_triton(Tensor z, ScalarType operand_dtype) -> (Tensor unit, Tensor norm)")
_library.define("unit_rows_backward_triton(Tensor z, Tensor norm, Tensor grad) -> Tensor dz")
_library.impl("unit_rows_triton", _forward, "CompositeExplicitAutograd")
_library.impl("unit_rows_backward_triton", _backward, "CompositeExplicitAutograd")
_FUNCTIONS = UnitRows(
    torch.ops.contrastive_ext.unit_rows_triton.default, torch.ops.contrastive_ext.unit_rows_backward_triton.default
)
