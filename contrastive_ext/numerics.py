"""Numerics shared by every path: which dtype computes, how rows are normalised, how operands are rounded.

fp16, bf16 and fp32 inputs are computed in float32 and float64 stays float64 (`stats_dtype`). Matrix products may take
16-bit operands; rounding to them is a straight-through step, so that gradients are those of the rounded operands and
are never themselves rounded in between.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and accumulators for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding_of_products(dtype: torch.dtype, dim: int) -> float:
    """How far apart two ways to compute the inner product of the same unit vectors [dim] may come out in `dtype`."""
    return 4 * dim**0.5 * torch.finfo(dtype).eps


@torch.no_grad()
def rounding_of_logits(scale: float | Tensor, u: Tensor, v: Tensor) -> Tensor:
    """[N] how far apart two ways to compute the logits scale <u_i, v_i> of rows [N, D] may come out."""
    lengths = torch.linalg.vector_norm(u, dim=1) * torch.linalg.vector_norm(v, dim=1)
    return scale * lengths * rounding_of_products(u.dtype, u.shape[1])


def in_torch_func() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp ...) is active: it wants plain PyTorch operations."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def without_autocast(z: object) -> AbstractContextManager:
    """A context in which autocast is off for the device of z; the meta device has none."""
    device = z.device.type if isinstance(z, Tensor) else "cpu"
    if device == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def normalize(z: Tensor) -> Tensor:
    """Rows of z [..., D] scaled to unit length; a zero row stays zero and gets a zero gradient.

    Expects the statistics dtype. Rows shorter than sqrt(smallest normal number) count as zero: their squares underflow.
    NaN and inf stay visible as NaN. Twice differentiable.
    """
    return z * _inverse_norm(z) if in_torch_func() else _Normalize.apply(z)


class _Normalize(torch.autograd.Function):
    # by hand: five tensor operations in the backward instead of twenty (docs/measurements.md, small batches)
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z * _inverse_norm(z)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, unit = ctx.saved_tensors
        along = unit * grad
        radial = along.sum(-1, keepdim=True)
        if torch.is_grad_enabled():  # to be differentiated again: nothing may be overwritten
            return torch.addcmul(grad, unit, radial, value=-1) * _inverse_norm(z)
        return torch.addcmul(grad, unit, radial, value=-1, out=along).mul_(_inverse_norm(z))


def _inverse_norm(z: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    is_zero = norm <= torch.finfo(z.dtype).tiny ** 0.5
    return norm.masked_fill(is_zero, torch.inf).reciprocal()


def resolve_operand_dtype(dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of products for inputs of `dtype`: its own, or 16 bits asked for float32; ValueError otherwise."""
    if asked in (None, dtype) or (dtype == torch.float32 and asked in (torch.float16, torch.bfloat16)):
        return asked or dtype
    allowed = "torch.float16, torch.bfloat16 or None" if dtype == torch.float32 else f"{dtype} or None"
    raise ValueError(f"operand_dtype of {dtype} inputs must be {allowed}; got {asked!r}.")


class _RoundOperand(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to the values `dtype` can hold, kept in its own dtype; the gradient passes through unrounded."""
    if x.dtype == dtype:
        return x
    return x + (x.to(dtype) - x).detach() if in_torch_func() else _RoundOperand.apply(x, dtype)


def logsumexp_pair(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) whose gradient is 0, not NaN, where both are -inf (a row without columns on either side)."""
    both_empty = (a == -torch.inf) & (b == -torch.inf)
    merged = torch.logaddexp(a.masked_fill(both_empty, 0.0), b.masked_fill(both_empty, 0.0))
    return merged.masked_fill(both_empty, -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact on both tails; `F.softplus` turns linear above 20 and is 2e-9 off there in float64."""
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))
