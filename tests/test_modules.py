"""Modules equal their functions; the learnable scale stays inside its bound and can come back."""

from __future__ import annotations

import math

import pytest
import torch

import contrastive_ext as ce
from rows import LOSSES, RANKED, random_pairs


@pytest.mark.parametrize("loss", LOSSES + RANKED, ids=lambda x: x.name)
def test_module_equals_function(loss):
    z1, z2 = random_pairs(6, 4)
    module = loss.module(0.3, **loss.parameters, layout="one_way")
    vectors = loss.vectors(z1)
    assert torch.equal(
        module(z1, z2, **vectors), loss.function(z1, z2, 0.3, layout="one_way", **loss.parameters, **vectors)
    )
    assert loss.module.__name__ in repr(module)


def test_call_overrides_construction():
    z1, z2 = random_pairs(6, 4)
    module = ce.InfoNCELoss(0.3, reduction="sum")
    assert torch.equal(module(z1, z2, temperature=0.7), ce.fused_infonce_loss(z1, z2, 0.7, reduction="sum"))
    scale = torch.tensor(2.0)
    assert torch.equal(
        module(z1, z2, logit_scale=scale), ce.fused_infonce_loss(z1, z2, logit_scale=scale, reduction="sum")
    )


def test_a_call_replaces_the_other_name_of_the_temperature_too():
    z1, z2 = random_pairs(6, 4)
    module = ce.InfoNCELoss(logit_scale=20.0)
    assert torch.equal(module(z1, z2, temperature=0.7), ce.fused_infonce_loss(z1, z2, 0.7))
    assert torch.equal(module(z1, z2, logit_scale=None), module(z1, z2))  # none given: the module's own
    assert torch.equal(ce.InfoNCELoss(0.7)(z1, z2, logit_scale=None), ce.fused_infonce_loss(z1, z2, 0.7))
    assert "temperature" not in repr(module)
    views = torch.stack([z1, z2])
    found = ce.FalseNegativeLoss(logit_scale=20.0)(views, temperature=0.7)
    assert torch.equal(found, ce.fused_false_negative_loss(views, 0.7))


def test_module_carries_its_queue():
    module = ce.DebiasedLoss(queue=ce.NegativeQueue(5, 4))
    module.queue.enqueue(torch.randn(5, 4))
    assert {"queue.data", "queue.ids", "queue.pointer", "queue.count"} <= set(module.state_dict())
    z1, z2 = random_pairs(6, 4)
    assert torch.equal(module(z1, z2), ce.fused_debiased_loss(z1, z2, queue=module.queue))
    assert module.to(torch.float64).queue.data.dtype == torch.float64


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        ce.InfoNCELoss(temprature=0.1)
    with pytest.raises(TypeError, match="temprature"):
        ce.fused_infonce_loss(*random_pairs(2, 2), temprature=0.1)
    with pytest.raises(TypeError, match="layouts"):
        ce.InfoNCELoss()(*random_pairs(2, 2), layouts="one_way")


def test_scale_is_clamped_and_recovers():
    scale = ce.LogitScale(temperature=0.011, max_scale=100.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    (-scale()).backward()  # wants a larger scale
    optimizer.step()
    assert scale().item() == pytest.approx(100.0)
    optimizer.zero_grad()
    scale().backward()  # wants a smaller one: a clamp inside the graph would give no gradient here
    assert scale.log_scale.grad.item() > 0
    with pytest.raises(ValueError, match="max_scale"):
        ce.LogitScale(temperature=0.001)


def test_scale_learns_through_a_loss():
    scale, (z1, z2) = ce.LogitScale(0.5), random_pairs(8, 4)
    ce.InfoNCELoss(layout="symmetric")(z1, z2, logit_scale=scale()).backward()
    temperature = torch.tensor(0.5, requires_grad=True)
    ce.fused_infonce_loss(z1, z2, temperature, layout="symmetric").backward()
    # d/d log(1/t) = -t d/dt
    assert scale.log_scale.grad.item() == pytest.approx(-0.5 * temperature.grad.item(), rel=1e-5)
    assert math.isfinite(temperature.grad.item())
