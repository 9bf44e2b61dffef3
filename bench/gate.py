"""The correctness gate: nothing is timed before its row losses and gradients are right.

Truth is the dense formula in float64, evaluated by blocks so that it fits at any N; for 16-bit inputs on the rounded
unit vectors, which is what 16-bit operands compute exactly. The tolerance is derived, not picked:

    float32, TF32     2 x the error of the dense formula in that dtype + a few ulps of the largest value
    fp16, bf16, fp64  relative L2 error of 1.5e-3, 7e-3, 1e-10

A loss of ranks jumps where two neighbours swap, in the dense formula as much as in ours, but elsewhere: its errors are
compared as relative L2, not element by element. Histogram ranks have a documented error of their own.

The upstream gradient is random: a uniform one hides errors between rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import baselines
from .case import Case, Inputs
from .losses import is_ranked
from .methods import Method

ULPS = 4
# float64 has no truth above it: two orders of summation must agree to what the package promises.
RELATIVE_L2 = {torch.float16: 1.5e-3, torch.bfloat16: 7e-3, torch.float64: 1e-10}
# A baseline is only asked whether it is the same loss: autocast at low temperature is percents wrong by nature.
BASELINE_RELATIVE_L2 = 0.1


@dataclass(frozen=True)
class Truth:
    """float64 results of a case, with the error of the dense formula in the case's dtype (None: RELATIVE_L2 holds)."""

    losses: Tensor
    upstream: Tensor
    gradients: tuple[Tensor, ...]
    dense_errors: tuple[float, ...] | None


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Compute the truth of a case and, for a dtype without a fixed goal, what the dense formula makes of it."""
    operand_dtype = case.torch_dtype if case.torch_dtype.itemsize == 2 else None
    exact = inputs.to(torch.float64)
    losses = baselines.chunked(case, exact, operand_dtype=operand_dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(losses), generator=generator, dtype=torch.float64).to(losses.device)
    gradients = torch.autograd.grad(losses, exact.leaves, upstream)
    truth = Truth(losses.detach(), upstream, gradients, None)
    if case.torch_dtype in RELATIVE_L2:
        return truth
    dense = _results(baselines.chunked, case, inputs, upstream)
    difference = _relative_l2 if is_ranked(case) else _max_difference
    errors = tuple(difference(*pair) for pair in zip(dense, (truth.losses, *gradients), strict=True))
    return Truth(truth.losses, upstream, gradients, errors)


def error_ratio(method: Method, case: Case, inputs: Inputs, truth: Truth) -> float:
    """Largest error over its tolerance, of losses and both gradients; <= 1 passes, NaN never does (returned as inf)."""
    if method.row_losses is None:
        got = _results(_as_vector(method.mean_loss), case, inputs, truth.upstream.new_ones(1))
        wanted = _mean_truth(case, inputs)
    else:
        got = _results(method.row_losses, case, inputs, truth.upstream)
        wanted = (truth.losses, *truth.gradients)
    if not method.is_ours:
        ratios = [_relative_l2(*pair) / BASELINE_RELATIVE_L2 for pair in zip(got, wanted, strict=True)]
    elif truth.dense_errors is None or method.relative_l2 is not None:
        limit = max(method.relative_l2 or 0.0, RELATIVE_L2.get(case.torch_dtype, 0.0))
        ratios = [_relative_l2(*pair) / limit for pair in zip(got, wanted, strict=True)]
    elif is_ranked(case):
        ulp = ULPS * torch.finfo(case.torch_dtype).eps
        ratios = [
            _relative_l2(mine, exact) / (2 * dense + ulp)
            for mine, exact, dense in zip(got, wanted, truth.dense_errors, strict=True)
        ]
    else:
        ulp = ULPS * torch.finfo(case.torch_dtype).eps
        ratios = [
            _max_difference(mine, exact) / (2 * dense + ulp * float(exact.abs().max()))
            for mine, exact, dense in zip(got, wanted, truth.dense_errors, strict=True)
        ]
    worst = max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)
    return worst if worst == worst else float("inf")


def _results(
    row_losses: Callable[[Case, Inputs], Tensor], case: Case, inputs: Inputs, upstream: Tensor
) -> tuple[Tensor, ...]:
    losses = row_losses(case, inputs)
    gradients = torch.autograd.grad(losses, inputs.leaves, upstream.to(losses.dtype))
    return (losses.detach(), *gradients)


def _mean_truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    exact = inputs.to(torch.float64)
    mean = _as_vector(lambda case, inputs: baselines.chunked(case, inputs).mean())
    return _results(mean, case, exact, exact.z1.new_ones(1))


def _as_vector(mean_loss: Callable[[Case, Inputs], Tensor]) -> Callable[[Case, Inputs], Tensor]:
    return lambda case, inputs: mean_loss(case, inputs).reshape(1)


def _max_difference(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def _relative_l2(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
