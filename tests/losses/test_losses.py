"""Every loss in every way of using it, on every backend: the error rule of accuracy.py against float64."""

from __future__ import annotations

import math

import pytest
import torch

import contrastive_ext as ce
from accuracy import evaluate, on_rounded_operands
from contrastive_ext import numerics
from promises import check_accuracy
from rows import INPUTS, LOSSES, SHAPES, USAGES, peaked_pairs, random_pairs

LOSS_IDS, USAGE_IDS = [loss.name for loss in LOSSES], [usage.name for usage in USAGES]


@pytest.mark.parametrize("usage", USAGES, ids=USAGE_IDS)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_every_layout(run, loss, usage):
    check_accuracy(loss, usage, "random", 17, 12, torch.float32, 0.3, run, reduction="none")


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 0.5, 100.0])
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_every_temperature_and_kind_of_input(run, loss, temperature, inputs):
    check_accuracy(loss, USAGES[0], inputs, 33, 17, torch.float32, temperature, run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", ["random", "peaked"])
@pytest.mark.parametrize("usage", [USAGES[0], USAGES[2], USAGES[-1]], ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_every_dtype(run, loss, usage, inputs, dtype):
    # 2^16 is what a GradScaler starts with; without it float16 gradients underflow
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    check_accuracy(loss, usage, inputs, 40, 32, dtype, 0.1, run, upstream=upstream)


@pytest.mark.parametrize("b, d, reason", SHAPES, ids=[f"{b}x{d}" for b, d, _ in SHAPES])
@pytest.mark.parametrize("usage", [USAGES[0], USAGES[3], USAGES[-1]], ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_every_shape(run, loss, usage, b, d, reason):
    check_accuracy(loss, usage, "random", b, d, torch.float32, 0.2, run)


@pytest.mark.parametrize("usage", [USAGES[0], USAGES[1], USAGES[-1]], ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_vectors_of_any_length(run, loss, usage):
    check_accuracy(loss, usage, "random", 20, 8, torch.float32, 2.0, run, normalize=False)


# Tiles do not see a formula: they meet one exponent, on the short road and composed, two, or one and its double.
@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.name in ("infonce", "dclw", "hard", "hard_fractional")], ids=lambda x: x.name
)
def test_many_tiles(run, loss):
    check_accuracy(loss, USAGES[0], "random", 1100, 24, torch.float32, 0.5, run)


@pytest.mark.parametrize("dtype, operand_error", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-24)])
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_converged_batch_keeps_its_relative_accuracy(run, loss, dtype, operand_error):
    """A loss of about 7e-4 is right to rounding of its logits; with the positive inside the sum it loses 3 digits."""
    backend, device = run
    z1, z2 = peaked_pairs(256, 64, dtype, device)
    temperature, parameters = 0.06, loss.parameters | loss.vectors(z1)
    inputs = {"z1": z1, "z2": z2}
    ours = evaluate(loss.function, inputs, 1.0, temperature=temperature, backend=backend, **parameters)
    exact = on_rounded_operands(loss.function, True)
    truth = evaluate(
        exact, {n: z.double() for n, z in inputs.items()}, 1.0, temperature=temperature, dtype=dtype, **parameters
    )
    if loss.name == "infonce":
        assert 1e-4 < truth.loss.item() < 5e-3
    # the loss is about e^{lse - pos}: its relative error is the absolute error of the logits
    allowed = 16 * operand_error / temperature
    assert abs(ours.loss.double() - truth.loss).item() <= allowed * abs(truth.loss.item())
    for name, expected in truth.grads.items():
        error = (ours.grads[name].double() - expected).norm() / expected.norm().clamp(min=1e-300)
        assert error.item() <= allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("operand_dtype, weight_error", [(torch.float16, 1.5e-3), (torch.bfloat16, 7e-3)])
@pytest.mark.parametrize("usage", [USAGES[0], USAGES[5], USAGES[-1]], ids=lambda u: u.name)
@pytest.mark.parametrize("loss", [x for x in LOSSES if x.name in ("infonce", "hard")], ids=lambda x: x.name)
def test_sixteen_bit_operands_on_request(run, loss, usage, operand_dtype, weight_error):
    """float32 rows, products of their unit rows rounded once: what float64 makes of the rounded rows."""
    backend, device = run
    z1, z2 = random_pairs(24, 16, torch.float32, device)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | {"temperature": 0.1}
    leaves = [z1.requires_grad_(), z2.requires_grad_()]
    value = loss.function(*leaves, backend=backend, operand_dtype=operand_dtype, **options)
    gradients = torch.autograd.grad(value, leaves)
    assert {value.dtype, *(g.dtype for g in gradients)} == {torch.float32}

    units = [numerics.normalize(z) for z in leaves]
    rounded = [u.detach().to(operand_dtype).double().requires_grad_() for u in units]
    if "queue" in options:
        options["queue"] = options["queue"].to(operand_dtype).double()
    truth = loss.function(*rounded, backend="reference", normalize=False, **options)
    by_unit = torch.autograd.grad(truth, rounded)
    assert abs(value.item() - truth.item()) <= 2e-6 * truth.item()
    for ours, theirs in zip(gradients, torch.autograd.grad(units, leaves, [g.float() for g in by_unit]), strict=True):
        assert (ours - theirs).norm() <= weight_error * theirs.norm()
    # the whole of it is not the rounding of something else
    unrounded = loss.function(*[u.double() for u in units], backend="reference", normalize=False, **options)
    assert abs(unrounded.item() - truth.item()) > 2e-6 * truth.item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("usage", USAGES, ids=USAGE_IDS)
def test_reductions_agree_with_none(run, usage, reduction):
    backend, device = run
    z1, z2 = random_pairs(6, 4, torch.float64, device)
    z2, options = usage.options(z1, z2)
    call = {"temperature": 0.5, "backend": backend, **options}
    rows = LOSSES[0].function(z1, z2, reduction="none", **call)
    expected = rows.mean() if reduction == "mean" else rows.sum()
    assert torch.allclose(LOSSES[0].function(z1, z2, reduction=reduction, **call), expected, rtol=1e-14)
    assert rows.shape == ((12,) if options.get("layout", "two_view") in ("two_view", "symmetric") else (6,))


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_a_row_without_negatives_costs_nothing(run, loss):
    backend, device = run
    z1, z2 = random_pairs(1, 4, torch.float32, device)
    z1.requires_grad_()
    value = loss.function(z1, z2, backend=backend, **loss.parameters, **loss.vectors(z1.detach()))
    value.backward()
    assert value.item() == 0.0
    assert z1.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [ce.fused_debiased_loss, ce.fused_hard_negative_loss])
def test_floor_far_below_the_largest_logit(run, function, dtype):
    """Positives that outweigh every negative put all rows on N e^{-1/t}, which underflows beside e^{|z|^2/t}."""
    backend, device = run
    z = 20 * torch.randn(5, 8, dtype=dtype, device=device)
    call = {"temperature": 0.5, "tau_plus": 0.5, "normalize": False, "layout": "one_way", "reduction": "none"}
    expected = math.log(4) - 2 + 2 * (z * z).sum(1)  # log N - 1/t - p with p = -|z|^2/t
    for name in (backend, "reference"):
        losses = function(z, -z, positives=10 * z[None], backend=name, **call)
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("usage", USAGES, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_bad_numbers_reach_the_loss(run, loss, usage, bad):
    backend, device = run
    z1, z2 = random_pairs(9, 4, torch.float32, device)
    z2, options = usage.options(z1, z2)
    z1[3, 1] = bad
    call = loss.parameters | loss.vectors(z1) | {"backend": backend}
    assert not loss.function(z1, z2, **options, **call).isfinite()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_bad_numbers_reach_the_loss_of_a_row_without_negatives(run, loss):
    backend, device = run
    z1, z2 = random_pairs(1, 4, torch.float32, device)
    z2[0, 0] = math.nan
    assert loss.function(z1, z2, backend=backend, **loss.parameters, **loss.vectors(z1)).isnan()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_zero_vector_gets_zero_gradient(run, loss):
    backend, device = run
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z1, z2 = random_pairs(5, 8, dtype, device)
        z1[2] = 0
        z1.requires_grad_()
        loss.function(z1, z2, backend=backend, **loss.parameters, **loss.vectors(z1.detach())).backward()
        assert z1.grad[2].eq(0).all()
        assert z1.grad.isfinite().all()
