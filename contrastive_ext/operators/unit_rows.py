"""Rows as sweeps take them, made by a backend in one pass each way where it has one.

The plain operations of `numerics.operand` are a dozen small ones forward and ten backward: of a small batch as much as
its sweep. They remain for torch.compile, which fuses them, and for whoever traces, transforms or differentiates twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..backends import dispatch
from ..backends.backend import UnitRows
from .registration import holds_numbers


def operand(z: Tensor, unit: bool, dtype: torch.dtype | None = None, *, backend: str) -> Tensor:
    """`numerics.operand` by the backend of a call."""
    dtype = dtype or z.dtype
    functions = _functions(z, dtype, backend) if unit else None
    return numerics.operand(z, unit, dtype) if functions is None else _Operand.apply(z.contiguous(), dtype, functions)


def _functions(z: Tensor, dtype: torch.dtype, backend: str) -> UnitRows | None:
    if backend == dispatch.REFERENCE or not holds_numbers(z) or numerics.wants_plain_operations():
        return None
    if z.numel() == 0 or z.is_meta:
        return None
    chosen = dispatch.select(backend, z.device, numerics.stats_dtype(dtype), dtype, z.shape[-1])
    return chosen.unit_rows(dtype)


class _Operand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, dtype: torch.dtype, functions: UnitRows) -> Tensor:
        unit, norm = functions.forward(z.view(-1, z.shape[-1]), dtype)
        ctx.backward_function, ctx.dtype = functions.backward, dtype
        ctx.save_for_backward(z, norm)
        return unit.view(z.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, norm = ctx.saved_tensors
        if torch.is_grad_enabled() or numerics.wants_plain_operations():  # differentiated again, or many at once
            with torch.enable_grad():
                again = numerics.operand(z, True, ctx.dtype)
                (dz,) = torch.autograd.grad(again, z, grad, create_graph=torch.is_grad_enabled())
            return dz, None, None
        flat = grad.contiguous().view(-1, z.shape[-1])
        return ctx.backward_function(z.view(flat.shape), norm, flat).view(z.shape), None, None
