"""An adapter against its host: values and gradients, and what every module owes its users."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import Tensor


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Float64 values and gradients of all inputs agree, for a random upstream gradient."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    expected, got = theirs(*inputs), ours(*inputs)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    found = torch.autograd.grad(got, inputs, upstream, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            # sums in another order: absolute errors are those of the largest element
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13 + 1e-12 * b.abs().max().item())


def assert_survives_copies(module: Callable[..., Tensor], *inputs: Tensor) -> None:
    """A pickled and a deep copy give the same value and the same repr."""
    expected = module(*inputs)
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(again(*inputs), expected)
        assert repr(again) == repr(module)


def assert_compiles(module: Callable[..., Tensor], *inputs: Tensor) -> None:
    """One graph, the same value and gradients."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, got = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    wanted, found = torch.autograd.grad(expected, inputs), torch.autograd.grad(got, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
