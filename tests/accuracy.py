"""The error rule: against float64, at most twice the error of the dense formula in the same dtype, plus a few ulps.

Truth is the dense reference in float64 on the operands the kernels see: unit vectors rounded to the operand dtype. The
ulps are those of the largest magnitude times the largest logit, because exp turns an absolute error of its argument
into a relative one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_ext import numerics

ULPS = 4


@dataclass(frozen=True)
class Result:
    """A loss and its gradients by input name."""

    loss: Tensor
    grads: dict[str, Tensor]


def evaluate(function, inputs: dict[str, Tensor], upstream: float, **arguments) -> Result:
    """Loss and gradients of `function(**inputs, **arguments)` under an upstream gradient as a GradScaler sends it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    loss = function(**leaves, **arguments)
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad((loss * weights).sum() * upstream, list(leaves.values()), allow_unused=True)
    named = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}
    return Result(loss.detach(), named)


def on_rounded_operands(function, normalize: bool, vectors=("z1", "z2", "negatives", "positives")):
    """`function` in float64, but on the operands that the dtype of the inputs leaves after normalising and rounding.

    vectors   names of the arguments that `normalize` is about
    """

    def rounded(z: Tensor, dtype: torch.dtype) -> Tensor:
        if not normalize or dtype in (torch.float32, torch.float64):
            return numerics.normalize(z) if normalize else z
        unit = numerics.normalize(z.detach().to(torch.float32)).to(dtype).double()
        exact = numerics.normalize(z)
        return exact + (unit - exact).detach()

    def truth(dtype: torch.dtype, **arguments):
        for name in vectors:
            if arguments.get(name) is not None:
                arguments[name] = rounded(arguments[name].double(), dtype)
        if isinstance(arguments.get("queue"), Tensor):
            arguments["queue"] = arguments["queue"].to(dtype).double()
        return function(**arguments, normalize=False, backend="reference")

    return truth


def largest_terms(function, inputs: dict[str, Tensor], upstream: float, **arguments) -> dict[str, float]:
    """For each input, the size of what its gradient is the difference of.

    Normalising removes the component along the vector; with one feature that is all, and the gradient is rounding.
    """
    units = {name: numerics.normalize(x.double()) for name, x in inputs.items()}
    at_units = evaluate(function, units, upstream, normalize=False, backend="reference", **arguments)
    shortest = {name: x.double().norm(dim=-1) for name, x in inputs.items()}
    return {
        name: at_units.grads[name].abs().max().item() / length[length > 0].min().item()
        for name, length in shortest.items()
    }


def assert_as_accurate_as_dense(
    ours: Result, dense: Result, truth: Result, logit: float, terms: dict[str, float], dtype: torch.dtype
) -> None:
    """The error rule for the loss and for each gradient; a failure shows the worst element of all three."""
    assert_close("loss", ours.loss, dense.loss, truth.loss, logit, 1.0, numerics.stats_dtype(dtype))
    for name in truth.grads:
        grads = (result.grads[name] for result in (ours, dense, truth))
        assert_close(f"gradient of {name}", *grads, logit, terms.get(name, 0.0), dtype)


def assert_close(
    what: str, ours: Tensor, dense: Tensor, truth: Tensor, logit: float, term: float, dtype: torch.dtype,
    upstream: float = 1.0,
) -> None:  # fmt: skip
    """The error rule for one tensor of `dtype`; logit, term: sizes of the largest logit and of what cancels.

    upstream   the largest gradient that a subnormal weight is multiplied with
    """
    ours, dense, truth = (x.double().cpu() for x in (ours, dense, truth))
    assert ours.isfinite().all(), f"{what}: {(~ours.isfinite()).sum()} elements are not finite"
    largest = truth.abs().max().item()
    slack = ULPS * torch.finfo(numerics.stats_dtype(dtype)).eps * max(1.0, logit) * max(largest, term)
    slack += torch.finfo(dtype).eps * largest  # the result itself is rounded to its dtype
    slack += torch.finfo(dtype).tiny * max(1.0, upstream)  # and may be subnormal
    error, allowed = (ours - truth).abs(), 2 * (dense - truth).abs().nan_to_num(nan=0.0).max().item() + slack
    if error.max() > allowed:
        worst = error.argmax().item()
        raise AssertionError(
            f"{what}: error {error.max():.3e} > {allowed:.3e} at flat index {worst}: "
            f"ours {ours.flatten()[worst]:.9e}, dense {dense.flatten()[worst]:.9e}, truth {truth.flatten()[worst]:.9e}"
        )
