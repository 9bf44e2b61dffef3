"""What is no ordinary tensor: the transforms of torch.func, tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import contrastive_ext as ce

LABELS = torch.arange(6) // 2
EVERY_LOSS = {
    "infonce": lambda a, b, **how: ce.fused_infonce_loss(a, b, 0.3, **how),
    "debiased": lambda a, b, **how: ce.fused_debiased_loss(a, b, 0.3, **how),
    "hard": lambda a, b, **how: ce.fused_hard_negative_loss(a, b, 0.3, **how),
    "bayesian": lambda a, b, **how: ce.fused_bayesian_loss(a, b, 0.3, **how),
    "false_negative": lambda a, b, **how: ce.fused_false_negative_loss(torch.stack([a, b]), 0.3, **how),
    "supcon": lambda a, b, **how: ce.fused_supcon_loss(torch.stack([a, b]), LABELS.to(a.device), 0.3, **how),
    "soft_target": lambda a, b, **how: ce.fused_soft_target_loss(a, b, b, 0.3, teacher_temperature=0.2, **how),
    "self_labeling": lambda a, b, **how: ce.fused_self_labeling_loss(a, b, None, temperature=0.3, **how),
}
every_loss = pytest.mark.parametrize("loss", EVERY_LOSS.values(), ids=EVERY_LOSS)


@every_loss
def test_the_reference_is_plain_pytorch_to_torch_func(loss):
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)

    def value(a):
        return loss(a, z2, backend="reference")

    expected = torch.autograd.functional.hessian(value, z1)
    torch.testing.assert_close(torch.func.hessian(value)(z1), expected, rtol=1e-10, atol=1e-12)
    batch = torch.stack([z1, z2])
    torch.testing.assert_close(torch.func.vmap(value)(batch), torch.stack([value(z1), value(z2)]))
    _, tangent = torch.func.jvp(value, (z1,), (z2,))
    torch.testing.assert_close(tangent, (torch.func.grad(value)(z1) * z2).sum())


@every_loss
def test_fused_losses_say_what_torch_func_needs(run, loss):
    backend, device = run
    z1, z2 = torch.randn(2, 6, 4, device=device)
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            transform(lambda a: loss(a, z2, backend=backend))(z1 if transform is torch.func.grad else z1[None])


@every_loss
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_shapes_follow_on_the_meta_device(loss, backend):
    z1, z2 = (torch.empty(6, 4, device="meta", requires_grad=True) for _ in range(2))
    value = loss(z1, z2, backend=backend)
    (grad,) = torch.autograd.grad(value, z1)
    assert value.shape == () and grad.shape == (6, 4)


@pytest.mark.parametrize("loss", [EVERY_LOSS["debiased"], EVERY_LOSS["hard"]])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_nothing_is_read_from_tensors_without_data(loss, backend):
    with FakeTensorMode():
        z1, z2 = (torch.empty(6, 4, requires_grad=True) for _ in range(2))
        temperature = torch.full((), 0.3, requires_grad=True)
        values = loss(z1, z2, backend=backend), ce.fused_infonce_loss(z1, z2, temperature, backend=backend)
        grads = torch.autograd.grad(sum(values), [z1, z2, temperature])
    assert [g.shape for g in grads] == [(6, 4), (6, 4), ()]
