"""The `cuda` backend: hand-written Hopper kernels (csrc/cuda/), 128 features, 16-bit operands. Taken by name only.

Correct on an H200 (tests/csrc/cuda, `python -m bench proof`), slower than the Triton triangle, which does half the
work (docs/measurements.md).

Forward only: lse at one exponent and the counts of the rows. The gradient is computed by the Triton kernels, from these
statistics; `explain` and `doctor` say so. What the forward does not make yet (a second exponent, column statistics, the
mean of frozen columns, diagnostics, cancelled pairs other than by ids) raises with that reason. `auto` must not take
this backend before it makes all of it, whatever VERIFIED says about a part: a test holds VERIFIED to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem.problem import PairSums, Problem, Statistics, Upstream
from ..problem.ranking import RankedStatistics, Ranking
from . import native
from .backend import Backend
from .triton import row_stats as triton

NAME = "cuda"
NOTE = "forward only, gradient by the Triton kernels; by name only"
IS_COMPLETE = False  # whether it computes every call that why_not lets through

FEATURES = 128
ARCHITECTURE = "9.0a"  # TMA and WGMMA exist on Hopper alone


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> str | None:
    """None, or why the Hopper kernels cannot take this call."""
    if device.type != "cuda":
        return f"it computes on NVIDIA Hopper GPUs and the tensors are on {device}."
    missing = native.why_missing()
    if missing is not None:
        return missing
    built_for = native.build_info().get("cuda_archs", "")
    if ARCHITECTURE not in built_for.replace(";", " ").split():
        what = f"for {built_for}" if built_for else "without nvcc"
        return f"the native library was built {what}; it needs sm_90a (TORCH_CUDA_ARCH_LIST={ARCHITECTURE})."
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"it needs compute capability 9.0 (Hopper); {device} is {torch.cuda.get_device_name(device)}."
    if operand_dtype not in (torch.float16, torch.bfloat16):
        return f"its products take float16 or bfloat16 operands, not {str(operand_dtype).removeprefix('torch.')}."
    if dim != FEATURES:
        return f"its kernels are for D = {FEATURES}, not {dim}."
    reason = triton.why_not(device, dtype, operand_dtype, dim)
    return None if reason is None else f"the Triton kernels compute its gradient: {reason}"


def why_not_call(problem: Problem, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> str | None:
    """None, or which part of the forward the kernels do not make yet."""
    pairs = problem.pairs
    parts = {
        "second exponent": len(problem.exponents) > 1,
        "column statistics (symmetric layouts)": columns,
        "means of frozen columns (gradients against a queue)": means,
        "diagnostics (return_stats)": diagnostics,
        "largest logits (soft labels)": maximum,
        "lists, gates or equal ids (detected false negatives, a guide)": (
            pairs.ignored is not None or pairs.gate is not None or pairs.only_equal_ids
        ),
    }
    lacking = next((part for part, is_asked in parts.items() if is_asked), None)
    if lacking is None:
        return None
    return f"its kernels make one log-sum-exp per row and no {lacking} yet. Use backend='triton' or 'auto'."


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`. Raises RuntimeError for parts the kernels do not make yet."""
    reason = why_not_call(problem, columns, means, diagnostics, maximum)
    if reason is not None:
        raise RuntimeError(f"backend {NAME!r} cannot run this call: {reason}")
    pairs, scale = problem.pairs, problem.scale
    scale_tensor = scale if isinstance(scale, Tensor) else None
    lse, count = torch.ops.contrastive_ext.row_stats_forward_cuda(
        problem.u.to(problem.operand_dtype),
        None if problem.v is None else problem.v.to(problem.operand_dtype),
        scale_tensor,
        0.0 if scale_tensor is not None else float(scale),
        problem.exponents[0],
        pairs.num_images,
        pairs.positive_offset,
        pairs.row_ids,
        None if problem.one_set else pairs.col_ids,
        problem.unit,
        torch.cuda.current_stream(problem.u.device).cuda_stream,
    )
    nothing = [problem.u.new_empty(0) for _ in range(3)]  # an operator's results must not share memory
    return Statistics(lse, count, *nothing)


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """The gradient, by the Triton kernels (NOTE says so where users look)."""
    return triton.backward(problem, upstream)


def ranked_forward(problem: Problem, ranking: Ranking, *, diagnostics: bool) -> RankedStatistics:
    """Raises: no such kernel yet."""
    raise RuntimeError(f"backend {NAME!r} cannot run this call: it has no weights by rank. Use 'triton'.")


def ranked_backward(*_, **__) -> tuple[Tensor, Tensor]:
    """Never reached: `ranked_forward` raises."""
    raise AssertionError


def pair_sums(*_, **__) -> PairSums:
    """Raises: no such kernel yet."""
    raise RuntimeError(f"backend {NAME!r} cannot run this call: it has no sums over pairs. Use 'triton'.")


def pair_sums_backward(*_, **__) -> tuple[Tensor, Tensor]:
    """Never reached: `pair_sums` raises."""
    raise AssertionError


def top_columns(*_, **__) -> tuple[Tensor, Tensor]:
    """Raises: no such kernel yet."""
    raise RuntimeError(f"backend {NAME!r} cannot run this call: it has no search for the best columns. Use 'triton'.")


BACKEND = Backend(
    name=NAME,
    why_not=why_not,
    forward=forward,
    backward=backward,
    top_columns=top_columns,
    ranked_forward=ranked_forward,
    ranked_backward=ranked_backward,
    pair_sums=pair_sums,
    pair_sums_backward=pair_sums_backward,
    needs_proof=True,
    note=NOTE,
)
