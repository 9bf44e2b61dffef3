"""The `triton` backend: the kernels of contrastive_ext.triton_kernels on NVIDIA GPUs from sm_80 on.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors in Triton's interpreter, which is how they are tested
without a GPU. Nothing here waits for the device: a scale tensor is read by the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.problem import Problem, Statistics, Upstream
from . import launch
from .forward import Forward
from .gradient import Term, gradients, total

OLDEST_NVIDIA = (8, 0)  # bf16 and TF32 products, asynchronous copies


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype, dim: int) -> str | None:
    """None, or why the Triton kernels cannot take this call."""
    missing = launch.why_missing()
    if missing is not None:
        return missing
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
    return Forward(problem, columns, means, diagnostics, maximum).run()


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    row_term = Term(upstream.lse.contiguous(), upstream.grad_lse.contiguous())
    col_term = None
    if upstream.col_lse is not None and upstream.grad_col_lse is not None:
        col_term = Term(upstream.col_lse.contiguous(), upstream.grad_col_lse.contiguous())
    with launch.on_device(problem.u.device):
        found = gradients(problem, row_term, col_term, upstream.need_u, upstream.need_v)
        du, dv = (problem.u.new_empty(0) if x is None else total(x) for x in found)
    return du, dv
