"""Every way to compute a case: the package's backends, the baselines, other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import contrastive_ext
from contrastive_ext.numerics import SPLIT_PRODUCTS

from . import baselines
from .case import Case, Inputs
from .device import Device
from .losses import dense_of, fused, is_ranked

# Peak bytes per element of the N x M matrix in eager PyTorch, measured at N = 8192 on the CPU: 16.3 with one exponent
# (logits, softmax, gradient, a temporary), 20.3 with two; 29 with three, self-labels at 1,024 x 17,408. Only decides
# what is not even tried.
EAGER_BYTES_PER_ELEMENT = {1: 16.3, 2: 20.3, 3: 29.0}
EAGER_BYTES_PER_RANKED_ELEMENT = 41.3  # and ranks: sorted logits, their places
# Comparing every negative with every other takes N^3 bytes and more.
LARGEST_COMPARISON = 512
# Histogram ranks are an approximation, documented for 256 bins and many negatives; few are half a rank off.
HISTOGRAM_RELATIVE_L2 = 1e-3


left_out: set[str] = set()  # backends that are not to be run: `--without`


@dataclass(frozen=True)
class Method:
    """A named way to compute a case.

    row_losses  [R] losses, differentiable; None where a library only returns the mean
    mean_loss   the 0-d mean, which is what gets timed
    is_ours     the correctness gate is strict, and a red one fails the run
    keeps_matrix  whether memory grows as N x M
    relative_l2  documented error of a method of ours that approximates, in place of the strict gate
    """

    name: str
    row_losses: Callable[[Case, Inputs], Tensor] | None
    mean_loss: Callable[[Case, Inputs], Tensor]
    is_ours: bool = False
    keeps_matrix: bool = False
    relative_l2: float | None = None

    def estimated_bytes(self, case: Case) -> int:
        """Memory of the matrix, before trying."""
        if is_ranked(case):
            per_element = EAGER_BYTES_PER_RANKED_ELEMENT
        else:
            per_element = EAGER_BYTES_PER_ELEMENT[len(dense_of(case).exponents)]
        return int(self.keeps_matrix * per_element * case.n * case.m)


def _baseline(name: str, row_losses: Callable[[Case, Inputs], Tensor], keeps_matrix: bool) -> Method:
    return Method(name, row_losses, lambda case, inputs: row_losses(case, inputs).mean(), keeps_matrix=keeps_matrix)


EAGER = _baseline("eager", baselines.eager, keeps_matrix=True)
CHUNKED = _baseline("chunked", baselines.chunked, keeps_matrix=False)
COMPILED = _baseline("compile", baselines.compiled, keeps_matrix=True)
COMPILED_AUTOCAST = _baseline("compile, autocast", baselines.compiled_autocast, keeps_matrix=True)
COMPARISON = _baseline("comparison", baselines.comparison, keeps_matrix=True)
AUTOCAST = _baseline("autocast", baselines.autocast, keeps_matrix=True)


def _backend(backend: str, suffix: str = "", relative_l2: float | None = None, **parameters) -> Method:
    return Method(
        backend + suffix,
        partial(fused, backend=backend, reduction="none", **parameters),
        partial(fused, backend=backend, reduction="mean", **parameters),
        is_ours=True,
        relative_l2=relative_l2,
    )


def backends_for(case: Case, device: Device) -> list[Method]:
    """The package's streaming backends that can run the case on the device."""
    probe = torch.empty(1, case.dim, dtype=case.torch_dtype, device=device.torch)
    reasons = contrastive_ext.explain(probe).reasons
    if reasons["cuda"] is None:
        reasons["cuda"] = _why_not_cuda(case)
    names = [name for name, reason in reasons.items() if name not in {"reference", *left_out} and reason is None]
    if case.dtype in SPLIT_PRODUCTS:
        names = [name for name in names if name == ("triton" if case.dtype == "fp16x3" else "cpu")]
    if not is_ranked(case):
        return [_backend(name) for name in names]
    exact = [_backend(name, ranks="exact") for name in names]
    error = HISTOGRAM_RELATIVE_L2 + 0.5 / case.negatives
    return exact + [_backend(name, ", histogram", error, ranks="histogram") for name in names]


def _why_not_cuda(case: Case) -> str | None:
    """Its forward is not complete yet; it raises for what it lacks."""
    simple = case.layout in ("two_view", "labelled") and len(dense_of(case).exponents) == 1 and not is_ranked(case)
    return None if simple else "it makes one log-sum-exp per row and no column statistics or means yet."


def methods_for(case: Case, device: Device) -> list[Method]:
    """Backends first, then baselines."""
    methods = backends_for(case, device)
    if case.fused_only:
        return methods
    methods += [EAGER, CHUNKED]
    if is_ranked(case) and case.n <= LARGEST_COMPARISON:
        methods.append(COMPARISON)
    if case.compile:
        methods += compiled_for(case, device)
    if case.dtype == "bfloat16" or (device.is_cuda and case.dtype == "float32"):
        methods.append(AUTOCAST)
    if case.peers and (device.is_cuda or case.dtype == "float32"):
        libraries = [(n, lib) for n, lib in baselines.THIRD_PARTIES.items() if lib.computes(case, device.is_cuda)]
        methods += [Method(name, None, library.mean_loss, keeps_matrix=True) for name, library in libraries]
    return methods


def compiled_for(case: Case, device: Device) -> list[Method]:
    """torch.compile in float32 and, on a GPU for inputs of 16 bits, with products of their precision."""
    return [COMPILED, COMPILED_AUTOCAST] if device.is_cuda and case.torch_dtype.itemsize == 2 else [COMPILED]


def find_method(name: str, case: Case, device: Device) -> Method:
    """The method of that name."""
    return next(method for method in methods_for(case, device) if method.name == name)
