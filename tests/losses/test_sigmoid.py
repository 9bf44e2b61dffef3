"""fused_sigmoid_loss: its definition at the extremes, learned scale and bias, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from peak_memory import needs_proc, peak_growth
from rows import INPUTS

fused = ce.fused_sigmoid_loss


def _definition(z1, z2, scale, bias, positive):
    logits = scale * F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(1)


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
@pytest.mark.parametrize("more", [0, 3])
def test_matches_the_definition(run, kind, more):
    backend, device = run
    z1, z2 = (x.to(device) for x in INPUTS[kind](8 + more, 6, torch.float64))
    z1 = z1[:8]
    ids = torch.arange(8 + more, device=device) % 5
    scale, bias = (torch.tensor(x, dtype=torch.float64, device=device) for x in (12.0, -4.0))
    inputs = [x.detach().requires_grad_() for x in (z1, z2, scale, bias)]
    for given in (None, ids):
        positive = torch.eye(8, 8 + more, dtype=torch.bool, device=device)
        positive = positive if given is None else positive | (ids[:8, None] == ids)
        expected = _definition(*inputs, positive)
        for name in (backend, "reference"):
            rows = fused(*inputs, ids=given, reduction="none", backend=name)
            torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-13)
            upstream = torch.randn_like(expected)
            got, wanted = (torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (rows, expected))
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-13 + 1e-12 * b.abs().max().item())


@pytest.mark.parametrize("scale, bias", [(1.0, 300.0), (1.0, -300.0), (3e4, 0.0), (1e-3, 0.0)])
def test_float32_at_the_extremes(run, scale, bias):
    """Nothing overflows, and the sum of many small terms keeps its digits."""
    backend, device = run
    z1, z2 = (x.to(device) for x in INPUTS["random"](33, 8, torch.float32))
    positive = torch.eye(33, dtype=torch.bool, device=device)
    z = [x.double().requires_grad_() for x in (z1, z2)]
    truth = _definition(*z, scale, bias, positive).mean()
    wanted = torch.autograd.grad(truth, z)
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (z1, z2)]
        loss = fused(*leaves, scale, bias, backend=name)
        logit = 8 * (1 + scale + abs(bias)) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=logit, atol=33 * logit)
        for got, expected in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            atol = 8 * logit * max(expected.abs().max().item(), scale * 1e-6)
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


def test_statistics(run):
    backend, device = run
    z1, z2 = (x.to(device) for x in INPUTS["peaked"](9, 6, torch.float64))
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7], device=device)
    _, stats = fused(z1, z2, 20.0, -10.0, ids=ids, return_stats=True, backend=backend)
    found = stats.to_dict()
    assert found["positives"] == pytest.approx(11 / 9)
    assert found["positive_probability"] > 0.9 > 0.5 > found["negative_probability"]
    assert fused(z1, z2, return_stats=True, backend=backend)[1].positives == 1


def test_second_derivatives_only_from_the_reference(run):
    backend, device = run
    z1, z2 = (x.to(device).requires_grad_() for x in INPUTS["random"](5, 4, torch.float64))
    (first,) = torch.autograd.grad(fused(z1, z2, 2.0, 0.0, backend="reference"), z1, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), z1)[0].isfinite().all()
    (first,) = torch.autograd.grad(fused(z1, z2, 2.0, 0.0, backend=backend), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_give_float32_values_and_gradients_of_their_own(run, dtype):
    backend, device = run
    z1, z2 = (x.to(device).requires_grad_() for x in INPUTS["random"](17, 8, dtype))
    loss = fused(z1, z2, 5.0, -2.0, backend=backend)
    assert loss.dtype == torch.float32
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(loss, (z1, z2)))


Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: fused(Z, Z[:3]), ValueError, "M >= B"),
        (lambda: fused(Z, Z, -1.0), ValueError, "logit_scale must be > 0"),
        (lambda: fused(Z, Z, logit_bias=float("inf")), ValueError, "logit_bias must be finite"),
        (lambda: fused(Z, Z, logit_bias=1e39), ValueError, "logit_bias must be finite in torch.float32"),
        (lambda: fused(Z, Z, logit_bias="-10"), TypeError, "logit_bias"),
        (lambda: fused(Z, Z, logit_bias=torch.zeros(4)), ValueError, "0-d"),
        (lambda: fused(Z, Z, ids=torch.zeros(4)), ValueError, "ids must be integers"),
        (lambda: fused(Z, Z, operand_dtype="fp16x3"), ValueError, "give a dtype or None"),
        (lambda: fused(Z, Z, operand_dtype="half"), ValueError, "operand_dtype"),
        (lambda: ce.SigmoidLoss(logit_bias=float("nan")), ValueError, "finite"),
        (lambda: ce.SigmoidLoss(logit_scale=0.0), ValueError, "> 0"),
    ],
)
def test_bad_input_says_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


@needs_proc
def test_memory_is_linear():
    setup = "z1, z2 = (torch.randn(n, 64).requires_grad_() for _ in range(2))"
    n = 8192
    growth = peak_growth(setup, "ce.fused_sigmoid_loss(z1, z2).backward()", small=16, large=n)
    assert 0 < growth <= 48 * 2**20, f"{growth / 2**20:.0f} MiB; one matrix is {n * n * 4 / 2**20:.0f} MiB"
