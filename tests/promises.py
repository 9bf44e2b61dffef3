"""What every loss over pairs promises, a check for each: accuracy, gradients, one graph, autocast, statistics.

A check takes `run` (backend, device) and rows of the tables in rows.py.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from accuracy import assert_as_accurate_as_dense, evaluate, largest_terms, on_rounded_operands
from rows import INPUTS, random_pairs


def check_accuracy(
    loss, usage, inputs, b, d, dtype, temperature, run, *, normalize=True, reduction="mean", upstream=1.0
):
    """Value and gradients are as close to float64 as the dense formula in the same dtype: the rule of accuracy.py."""
    backend, device = run
    z1, z2 = INPUTS[inputs](b, d, dtype, device)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | {"reduction": reduction, "temperature": temperature}
    differentiable = {"z1": z1, "z2": z2}
    vectors = loss.vectors(z1)
    differentiable |= {n: vectors.pop(n) for n in ("positives",) if n in vectors}
    differentiable |= {n: options.pop(n) for n in ("negatives",) if n in options}
    options |= vectors
    ours = evaluate(loss.function, differentiable, upstream, backend=backend, normalize=normalize, **options)
    dense = evaluate(loss.function, differentiable, upstream, backend="reference", normalize=normalize, **options)
    exact = on_rounded_operands(loss.function, normalize)
    truth = evaluate(exact, {n: x.double() for n, x in differentiable.items()}, upstream, dtype=dtype, **options)
    longest = max(x.double().norm(dim=-1).max().item() for x in (z1, z2))
    logit = (1.0 if normalize else longest**2) / temperature
    terms = largest_terms(loss.function, differentiable, upstream, **options) if normalize else {}
    assert_as_accurate_as_dense(ours, dense, truth, logit, terms, dtype)


def check_gradients(function, *tensors):
    """The gradients of a function of float64 tensors are those of finite differences."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=False)


def check_one_graph(run, loss, usage):
    """torch.compile makes one graph of a call with a learnable temperature, with the value and gradients of eager."""
    backend, device = run
    z1, z2 = random_pairs(6, 4, torch.float32, device)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | loss.vectors(z1) | {"backend": backend}
    temperature = torch.tensor(0.4, device=device)

    def step(z1, z2, temperature):
        return loss.function(z1, z2, temperature, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [x.clone().requires_grad_() for x in (z1, z2, temperature)]
        value = function(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        results.append([value.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def check_autocast_changes_nothing(run, loss, dtype):
    """Inside autocast the value and the gradients are the same bits."""
    backend, device = run
    z1, z2 = random_pairs(9, 16, dtype, device)
    options = loss.parameters | loss.vectors(z1) | {"backend": backend}
    results = []
    for enabled in (False, True):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            value = loss.function(*leaves, 0.2, **options)
        assert value.dtype == torch.float32
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def check_statistics(run, loss, usage):
    """`return_stats` reports what the reference reports, beside the same loss."""
    backend, device = run
    z1, z2 = random_pairs(9, 5, torch.float64, device)
    z2, options = usage.options(z1, z2)
    call = options | loss.parameters | loss.vectors(z1) | {"temperature": 0.4, "return_stats": True}
    value, ours = loss.function(z1, z2, backend=backend, **call)
    _, expected = loss.function(z1, z2, backend="reference", **call)
    without = loss.function(z1, z2, backend=backend, **(call | {"return_stats": False}))
    torch.testing.assert_close(value, without, rtol=1e-14, atol=1e-14)  # another road: the same to rounding
    for name, number in expected.to_dict().items():
        assert ours.to_dict()[name] == pytest.approx(number, rel=1e-10, abs=1e-12), name
