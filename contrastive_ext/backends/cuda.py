"""The `cuda` backend: hand-written Hopper kernels (csrc/cuda/), 64, 128 or 256 features, 16-bit operands. By name only.

The log-sum-exps of rows, and of columns from the same pass, at one exponent and their counts, and the gradient of it.
What the forward does not make yet (a second exponent, the mean of frozen columns, diagnostics, cancelled pairs other
than by ids) raises with that reason: Triton takes over where `auto` chooses. `auto` must not take this backend before
it makes all of it, whatever VERIFIED says about a part: a test holds VERIFIED to that.

The forward at 128 features was correct on an H200, slower than the Triton triangle, which does half the work
(docs/measurements.md); everything since then is proven by the interpreter of PTX and has yet to run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem.problem import PairSums, Problem, Statistics, Upstream
from ..problem.ranking import RankedStatistics, Ranking
from . import native
from .backend import Backend

NAME = "cuda"
NOTE = "log-sum-exps of rows and columns at one exponent and their gradient; by name only"
IS_COMPLETE = False  # whether it computes every call that why_not lets through

FEATURES = (64, 128, 256)
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
    if dtype == torch.float64:
        return "its statistics are float32 and the inputs float64."
    if dim not in FEATURES:
        return f"its kernels are for D = {', '.join(map(str, FEATURES))}, not {dim}."
    return None


def why_not_call(problem: Problem, means: bool, diagnostics: bool, maximum: bool) -> str | None:
    """None, or which part of the forward the kernels do not make yet."""
    pairs = problem.pairs
    parts = {
        "second exponent": len(problem.exponents) > 1,
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
    return f"its kernels make one log-sum-exp per row or column and no {lacking} yet. Use backend='triton' or 'auto'."


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`. Raises RuntimeError for parts the kernels do not make yet."""
    reason = why_not_call(problem, means, diagnostics, maximum)
    if reason is not None:
        raise RuntimeError(f"backend {NAME!r} cannot run this call: {reason}")
    stream = torch.cuda.current_stream(problem.u.device).cuda_stream
    made = torch.ops.contrastive_ext.row_stats_forward_cuda(*_arguments(problem), columns, stream)
    lse, count, col_lse, col_count = made
    return Statistics(lse, count, col_lse, col_count, problem.u.new_empty(0))


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    terms = (upstream.lse, upstream.grad_lse, upstream.col_lse, upstream.grad_col_lse)
    return torch.ops.contrastive_ext.row_stats_backward_cuda(
        *_arguments(problem),
        *(None if x is None else x.contiguous() for x in terms),
        upstream.need_u,
        upstream.need_v and not problem.one_set,
        torch.cuda.current_stream(problem.u.device).cuda_stream,
    )


def _arguments(problem: Problem) -> tuple:
    """What both operators are told of a problem: u to unit."""
    pairs, scale = problem.pairs, problem.scale
    is_tensor = isinstance(scale, Tensor)
    return (
        problem.u.to(problem.operand_dtype).contiguous(),
        None if problem.v is None else problem.v.to(problem.operand_dtype).contiguous(),
        scale if is_tensor else None,
        0.0 if is_tensor else float(scale),
        problem.exponents[0],
        pairs.num_images,
        pairs.positive_offset,
        pairs.row_ids,
        None if problem.one_set else pairs.col_ids,
        problem.unit,
    )


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
    note=lambda operand_dtype: NOTE,
)
