"""Numerical differentiation in float64: every loss and layout, a learnable temperature, rows on the floor."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from promises import check_gradients
from rows import LOSSES, USAGES, peaked_pairs, random_pairs

# held-constant weights are no function's derivative; test_losses.py holds their gradient against the dense formula
DIFFERENTIABLE = [loss for loss in LOSSES if not loss.parameters.get("detach_weights")]


@pytest.mark.parametrize("usage", USAGES, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", DIFFERENTIABLE, ids=lambda x: x.name)
def test_gradcheck_every_layout_with_a_learnable_temperature(run, loss, usage):
    backend, device = run
    z1, z2 = random_pairs(5, 4, torch.float64, device)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | loss.vectors(z1) | {"backend": backend}

    def function(z1, z2, temperature):
        return loss.function(z1, z2, temperature, **options)

    check_gradients(function, z1, z2, torch.tensor(0.7, dtype=torch.float64, device=device))


@pytest.mark.parametrize(
    "loss", [x for x in DIFFERENTIABLE if "positive_weight" not in x.vectors(torch.ones(2, 2))], ids=lambda x: x.name
)
def test_gradcheck_rows_on_the_floor(run, loss):
    """With a low temperature some rows are clamped: they pull nothing, but the floor moves with the temperature."""
    backend, device = run
    z1, z2 = peaked_pairs(6, 4, torch.float64, device)
    z1[:3], z2[:3] = random_pairs(3, 4, torch.float64, device)
    options = loss.parameters | loss.vectors(z1) | {"backend": backend, "reduction": "none"}
    temperature = torch.tensor(0.35, dtype=torch.float64, device=device)
    if "tau_plus" in loss.parameters:
        _, stats = loss.function(z1, z2, temperature, return_stats=True, **options)
        assert 0 < stats.clamped_fraction < 1
    check_gradients(lambda a, b, t: loss.function(a, b, t, **options), z1, z2, temperature)


@pytest.mark.parametrize("layout", ["two_view", "one_way", "symmetric"])
def test_gradcheck_logit_scale_and_raw_vectors(run, layout):
    backend, device = run
    z1, z2 = random_pairs(4, 3, torch.float64, device)

    def function(z1, z2, scale):
        return ce.fused_infonce_loss(z1, z2, logit_scale=scale, layout=layout, normalize=False, backend=backend)

    check_gradients(function, z1, z2, torch.tensor(0.4, dtype=torch.float64, device=device))


@pytest.mark.parametrize("loss", DIFFERENTIABLE, ids=lambda x: x.name)
def test_gradcheck_further_inputs_with_gradient(run, loss):
    """Explicit negatives and debiasing positives receive gradient too."""
    backend, device = run
    z1, z2 = random_pairs(4, 3, torch.float64, device)
    negatives = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    vectors = loss.vectors(z1)
    positives = vectors.pop("positives", None)

    def function(negatives, *positives):
        extra = dict(zip(["positives"], positives, strict=False))
        return loss.function(
            z1, z2, 0.6, layout="one_way", negatives=negatives, backend=backend, **loss.parameters, **vectors, **extra
        )

    check_gradients(function, negatives, *([] if positives is None else [positives]))


@pytest.mark.parametrize("loss", DIFFERENTIABLE, ids=lambda x: x.name)
def test_reference_supports_second_derivatives(loss):
    z1, z2 = random_pairs(4, 3, torch.float64)
    options = loss.parameters | loss.vectors(z1) | {"backend": "reference"}
    leaves = [x.requires_grad_() for x in (z1, z2)]
    assert torch.autograd.gradgradcheck(lambda a, b: loss.function(a, b, 0.8, **options), leaves)


def test_reference_works_under_torch_func():
    z1, z2 = random_pairs(4, 3, torch.float32)
    expected = torch.autograd.grad(ce.fused_debiased_loss(z1.requires_grad_(), z2, backend="reference"), z1)[0]
    ours = torch.func.grad(lambda a: ce.fused_debiased_loss(a, z2, backend="reference"))(z1.detach())
    torch.testing.assert_close(ours, expected)


def test_fused_losses_refuse_second_derivatives(run):
    backend, device = run
    z1, z2 = random_pairs(4, 3, torch.float64, device)
    z1.requires_grad_()
    loss = ce.fused_debiased_loss(z1, z2, backend=backend)
    (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()
