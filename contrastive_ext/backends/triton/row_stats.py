"""The `triton` backend: the kernels of contrastive_ext.triton_kernels on NVIDIA GPUs from sm_80 on.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors in Triton's interpreter, which is how they are tested
without a GPU. Nothing here waits for the device: a scale tensor is read by the kernels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...problem.problem import Problem, Statistics, Upstream
from ..backend import lacks_products
from . import launch
from .forward import Forward
from .gradient import Term, gradients, total

OLDEST_NVIDIA = (8, 0)  # bf16 and TF32 products, asynchronous copies


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> str | None:
    """None, or why the Triton kernels cannot take this call."""
    missing = launch.why_missing()
    if missing is not None:
        return missing
    most = launch.kernels().configs.RESIDENT_FEATURES
    lacking = lacks_products(operand_dtype, "fp16x3")
    if lacking is not None:
        return lacking
    if isinstance(operand_dtype, str) and dim > most:
        return f"its {operand_dtype!r} products end at {most} features; these rows have {dim}."
    if device.type == "cpu":
        if launch.interpreted():
            return None
        return "it computes on GPUs and the tensors are on cpu (TRITON_INTERPRET is not 1)."
    if device.type != "cuda":
        return f"it computes on CUDA devices and the tensors are on {device}."
    if torch.version.hip is not None:
        return "there are no tile sizes for ROCm devices yet (triton_kernels/configs.py)."
    if torch.cuda.get_device_capability(device) < OLDEST_NVIDIA:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 or newer; {device} has {major}.{minor}."
    return None


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`."""
    whole, _, by_v = prepared(problem)
    stats = Forward(whole, columns, means, diagnostics, maximum).run()
    return stats if whole is problem or not means else stats._replace(mean=of_original(stats.mean, problem, 1 / by_v))


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    row_term = Term(upstream.lse.contiguous(), upstream.grad_lse.contiguous())
    col_term = None
    if upstream.col_lse is not None and upstream.grad_col_lse is not None:
        col_term = Term(upstream.col_lse.contiguous(), upstream.grad_col_lse.contiguous())
    return gradients_of(problem, row_term, col_term, upstream.need_u, upstream.need_v)


def gradients_of(
    problem: Problem, row_term: Term, col_term: Term | None, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    """The gradient that these weights make, an empty tensor where not needed."""
    with launch.on_device(problem.u.device):
        whole, *factors = prepared(problem)
        found = gradients(whole, row_term, col_term, need_u, need_v)
        du, dv = (problem.u.new_empty(0) if x is None else total(x) for x in found)
    if whole is not problem:
        du, dv = (x if x.numel() == 0 else of_original(x, problem, by) for x, by in zip((du, dv), factors, strict=True))
    return du, dv


def prepared(problem: Problem) -> tuple[Problem, float | Tensor, float | Tensor]:
    """The same problem for operands of two parts, and what u and v were multiplied by: numbers that fp16 can hold.

    Vectors that are not of unit length are brought to 1 by a power of two, which the scale undoes; features are padded
    to what products take, because one part stands behind the other.
    """
    if not problem.products:
        return problem, 1.0, 1.0
    features = problem.u.shape[1]
    more = launch.feature_block(features) - features
    by_u = by_v = 1.0  # type: float | Tensor
    scale = problem.scale
    if not problem.unit:
        by_u = _to_one(problem.u)
        by_v = by_u if problem.v is None else _to_one(problem.v)
        scale = scale / by_u / by_v
    u = torch.nn.functional.pad(problem.u * by_u, (0, more))
    v = None if problem.v is None else torch.nn.functional.pad(problem.v * by_v, (0, more))
    return replace(problem, u=u, v=v, scale=scale), by_u, by_v


def of_original(x: Tensor, problem: Problem, factor: float | Tensor) -> Tensor:
    """Vectors of the prepared problem [..., padded] times the factor, as those of the problem it was made of."""
    return (x * factor)[..., : problem.u.shape[1]].contiguous()


def _to_one(x: Tensor) -> Tensor:
    """The power of two that brings the largest number to (1/2, 1]."""
    largest = x.abs().nan_to_num(0.0, 0.0, 0.0).amax() if x.numel() else x.new_zeros(())
    return largest.log2().ceil().clamp(-60, 60).neg().exp2()
