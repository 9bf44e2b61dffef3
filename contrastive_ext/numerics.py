"""Numerics shared by every path: which dtype computes, how rows are normalised, how operands are rounded.

fp16, bf16 and fp32 inputs are computed in float32 and float64 stays float64 (`stats_dtype`). Matrix products may take
16-bit operands; rounding to them is a straight-through step, so that gradients are those of the rounded operands and
are never themselves rounded in between.
"""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .checks import can_read

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Products of float32 operands on matrix units for 16 bits: every operand is the sum of parts of 16 bits, a product the
# products of parts that matter. fp16x3 (Triton): three products of two parts, which keep 22 bits. bf16x3 (cpu, AMX):
# six products of three parts, which keep all. Not every backend has them.
SPLIT_PRODUCTS = ("fp16x3", "bf16x3")


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


def wants_plain_operations() -> bool:
    """Whether torch.func or forward-mode differentiation is active: a Function with a backward alone fails there."""
    return in_torch_func() or (not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0)


def without_autocast(z: object) -> AbstractContextManager:
    """A context in which autocast is off for the device of z; the meta device has none."""
    device = z.device.type if isinstance(z, Tensor) else "cpu"
    if device == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _known_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same; torch works out the signature of a `forward` beside a `setup_context` anew in every call, 10 us."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@_known_signature
class _Product(torch.autograd.Function):
    """What torch.compile traces, which knows no Function with a jvp."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with without_autocast(grad):
            return grad @ b.mT, a.mT @ grad


class _EagerProduct(_Product):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return product(grad, b.mT) if need_a else None, product(a.mT, grad) if need_b else None

    @staticmethod
    def jvp(ctx, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        by_a, by_b = da if da is None else product(da, b), db if db is None else product(a, db)
        return by_b if by_a is None else by_a if by_b is None else by_a + by_b


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices, or batches [N, ., .] of them, in the dtype they have.

    The losses leave autocast in their forward, but a gradient may be taken inside it: the backward of a plain `@` would
    then be rounded to 16 bits. Differentiable in every mode and as often as one likes.
    """
    return (_Product if torch.compiler.is_compiling() else _EagerProduct).apply(a, b)


def own_products(anchors: Tensor, candidates: Tensor) -> Tensor:
    """[A, n] products of every anchor [A, D] with candidates of its own [A, n, D]."""
    return product(anchors[:, None], candidates.mT)[:, 0]


def normalize(z: Tensor) -> Tensor:
    """Rows of z [..., D] divided by their length; a zero row stays zero and gets a zero gradient.

    Expects the statistics dtype. Rows shorter than sqrt(smallest normal number) count as zero: their squares underflow.
    Any other finite row is scaled as need be before it is squared. NaN and inf stay visible as NaN. Twice
    differentiable.
    """
    if not wants_plain_operations():
        return _Normalize.apply(z)
    shrink, norm = scaled_norm(z)
    return z * shrink / norm


class _Normalize(torch.autograd.Function):
    # by hand: four tensor operations in the backward instead of twenty (docs/measurements.md, small batches)
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        norm = finite_norm(z)
        if norm is not None:
            unit, factor = z / norm, norm.reciprocal()
        else:
            shrink, norm = scaled_norm(z)
            # not div_: torch 2.11 compiles an operation in place here into a gradient of zero
            unit, factor = z * shrink / norm, shrink / norm
        ctx.save_for_backward(z, unit, factor)
        return unit

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, unit, factor = ctx.saved_tensors
        radial = (unit * grad).sum(-1, keepdim=True)
        tangent = torch.addcmul(grad, unit, radial, value=-1)
        if torch.is_grad_enabled():  # to be differentiated again: nothing may be overwritten, or constant
            shrink, norm = scaled_norm(z)
            return tangent * (shrink / norm)
        return tangent.mul_(factor)


@torch.no_grad()
def finite_norm(z: Tensor) -> Tensor | None:
    """[..., 1] what the rows have to be divided by, without a gradient: a look in place of five operations.

    None where nothing may be looked at, or where squares of a row are no finite numbers: `scaled_norm` knows.
    """
    if not can_read(z):
        return None
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if not bool((norm < torch.inf).all()):
        return None
    return norm.masked_fill_(norm <= torch.finfo(z.dtype).tiny ** 0.5, torch.inf)


def scaled_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 1] a power of two that keeps a row's squares finite, and the length of the row times it, inf for zero rows.

    A row is divided by its length: multiplied by a reciprocal, rows of one feature would not be exactly 1 or -1.
    """
    norm = torch.linalg.vector_norm(z.detach(), dim=-1, keepdim=True)
    finfo = torch.finfo(z.dtype)
    shrink = torch.ones_like(norm).masked_fill(norm == torch.inf, 2.0 ** -(3 * math.frexp(finfo.max)[1] // 4))
    norm = torch.linalg.vector_norm(z * shrink, dim=-1, keepdim=True)
    return shrink, norm.masked_fill(norm <= finfo.tiny**0.5, torch.inf)


def resolve_operand_dtype(dtype: torch.dtype, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype of operands for inputs of `dtype`: its own, or 16 bits asked for float32; ValueError otherwise."""
    if isinstance(asked, str) and asked in SPLIT_PRODUCTS and dtype == torch.float32:
        return dtype
    if asked is None or asked == dtype or (dtype == torch.float32 and asked in (torch.float16, torch.bfloat16)):
        return dtype if asked is None or isinstance(asked, str) else asked
    names = ", ".join(map(repr, SPLIT_PRODUCTS))
    allowed = f"torch.float16, torch.bfloat16, {names} or None" if dtype == torch.float32 else f"{dtype} or None"
    raise ValueError(f"operand_dtype of {dtype} inputs must be {allowed}; got {asked!r}.")


@_known_signature
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
    return x + (x.to(dtype) - x).detach() if wants_plain_operations() else _RoundOperand.apply(x, dtype)


def operand(z: Tensor, unit: bool, dtype: torch.dtype | None = None) -> Tensor:
    """z as the sweeps take it: in the statistics dtype, with `unit` normalised, holding values of `dtype` (its own).

    An infinity becomes NaN, as it does where rows are normalised: an infinite positive, or a negative at minus
    infinity, would give a finite loss.
    """
    given, dtype = z.dtype, dtype or z.dtype
    z = z.to(stats_dtype(dtype))
    if unit:
        return round_operand(normalize(z), dtype)
    z = z if given == dtype else round_operand(z, dtype)
    return z - (z - z).detach()


def spoil(x: Tensor, keys: Tensor) -> Tensor:
    """x, but NaN throughout if `keys` hold a NaN or an infinity: for keys too many to copy, in place of `operand`."""
    if keys.shape[0] == 0:
        return x
    least, largest = torch.aminmax(keys)  # half the time of both alone, a twentieth of an infinity norm's
    return x + ((least - least) + (largest - largest))


def logsumexp_pair(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) whose gradient is 0, not NaN, where both are -inf (a row without columns on either side)."""
    both_empty = (a == -torch.inf) & (b == -torch.inf)
    merged = torch.logaddexp(a.masked_fill(both_empty, 0.0), b.masked_fill(both_empty, 0.0))
    return merged.masked_fill(both_empty, -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact on both tails; `F.softplus` turns linear above 20 and is 2e-9 off there in float64."""
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


def take_rows(z: Tensor, index: Tensor) -> Tensor:
    """z[index] for rows [M, D]; gradients of a row that is taken often are summed in a fixed order on every device."""
    return z[index] if wants_plain_operations() else _TakeRows.apply(z, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = z.shape[0]
        return z[index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _SumRows.apply(grad, index, ctx.rows), None


class _SumRows(torch.autograd.Function):
    """[rows, D] sums of the rows of `grad` that come from each; segments, not atomics."""

    @staticmethod
    def forward(ctx, grad: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        lengths = torch.zeros(rows, dtype=torch.int64, device=index.device)
        lengths = lengths.scatter_add_(0, index, torch.ones_like(index))
        return torch.segment_reduce(grad[index.argsort(stable=True)], "sum", lengths=lengths, unsafe=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return take_rows(grad, index), None, None
