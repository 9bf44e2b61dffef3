"""The momentum encoder, mixed inputs and the schedule do what their formulas say."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import contrastive_ext as ce


def _encoder(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


def test_parameters_are_averaged_and_buffers_copied():
    online = _encoder()
    target = copy.deepcopy(online)
    before = copy.deepcopy(dict(target.named_parameters()))
    with torch.no_grad():
        for x in online.parameters():
            x.add_(torch.randn_like(x))
    online(torch.randn(8, 4))  # moves the batch-norm statistics
    ce.momentum_update(online, target, 0.9)
    ours = dict(online.named_parameters())
    for name, x in target.named_parameters():
        torch.testing.assert_close(x, 0.9 * before[name] + 0.1 * ours[name])
    for ours, theirs in zip(online.buffers(), target.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert target[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_the_ends_are_exact_and_leave_no_graph(m):
    online, target = _encoder(), _encoder()
    expected = copy.deepcopy(online if m == 0.0 else target)
    ce.momentum_update(online, target, m)
    for x, y in zip(target.parameters(), expected.parameters(), strict=True):
        assert torch.equal(x, y) and x.grad_fn is None


@pytest.mark.parametrize(
    "online, target, m, says",
    [
        (_encoder(), _encoder(), 1.5, "m must be in"),
        (_encoder(), _encoder(5), 0.9, "0.weight"),
        (_encoder(), nn.Linear(4, 3), 0.9, "same parameters"),
        (nn.Linear(2, 2), nn.Sequential(), 0.9, "bias, weight"),
    ],
)
def test_update_refuses_what_does_not_fit(online, target, m, says):
    with pytest.raises(ValueError, match=says):
        ce.momentum_update(online, target, m)


def test_update_refuses_a_target_that_is_the_encoder():
    online = _encoder()
    with pytest.raises(ValueError, match="deepcopy"):
        ce.momentum_update(online, online, 0.9)


def _same_memory(online: nn.Module) -> nn.Module:
    """Other parameter objects over the memory of the encoder's."""
    target = copy.deepcopy(online)
    for ours, theirs in zip(online.parameters(), target.parameters(), strict=True):
        theirs.data = ours.data
    return target


def _one_buffer(online: nn.Module) -> nn.Module:
    """A weight that is a part of the memory of an encoder's buffer."""
    target = copy.deepcopy(online)
    flat = torch.zeros(100)
    online[0].weight.data = flat[:12].view(3, 4)
    target[0].weight.data = flat[4:16].view(3, 4)
    return target


@pytest.mark.parametrize("shared", [_same_memory, _one_buffer])
def test_update_refuses_a_target_in_the_memory_of_the_encoder(shared):
    online = _encoder()
    target = shared(online)
    before = copy.deepcopy(dict(online.named_parameters()))
    with pytest.raises(ValueError, match="deepcopy"):
        ce.momentum_update(online, target, 0.9)
    assert all(torch.equal(x, before[name]) for name, x in online.named_parameters())


def test_update_takes_neighbours_in_one_buffer():
    online, target = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    flat = torch.arange(8.0)
    online.weight.data, target.weight.data = flat[:4].view(2, 2), flat[4:].view(2, 2)
    ce.momentum_update(online, target, 0.5)
    assert torch.equal(target.weight.detach().flatten(), torch.arange(4.0) + 2)


def test_tied_weights_move_once():
    online = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    target = copy.deepcopy(online)
    for encoder in (online, target):
        encoder[1].weight.data = encoder[0].weight.data  # tied through memory, not by one parameter object
    with torch.no_grad():
        online[0].weight.add_(1.0)
    before = target[0].weight.detach().clone()
    ce.momentum_update(online, target, 0.75)
    torch.testing.assert_close(target[0].weight.detach(), before + 0.25)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixes_the_other_view_of_another_image(shape, dtype):
    x, other = torch.randn(2, *shape, dtype=dtype)
    mixed, perm, theta = ce.momentum_mixup(x, other, 2.0)
    assert sorted(perm.tolist()) == list(range(5)) and perm.dtype == torch.int64
    assert theta.shape == (5,) and len(set(theta.tolist())) == 5  # one per sample
    for i in range(5):
        t = theta[i].to(dtype)
        torch.testing.assert_close(mixed[i], t * x[i] + (1 - t) * other[perm[i]])


def test_mixing_repeats_with_its_generator():
    x, other = torch.randn(2, 6, 3)
    results = [ce.momentum_mixup(x, other, 0.1, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kappa", [0.001, 0.1, 1.0, 2.0, 50.0])
def test_theta_is_beta_distributed(kappa):
    n = 20_000
    theta = ce.momentum_mixup(torch.zeros(n), torch.zeros(n), kappa, torch.Generator().manual_seed(0))[2].double()
    assert ((theta >= 0) & (theta <= 1)).all()
    variance = 1 / (4 * (2 * kappa + 1))  # of Beta(kappa, kappa), mean 1/2
    assert abs(theta.mean() - 0.5) <= 5 * math.sqrt(variance / n)
    fourth = 3 / (16 * (2 * kappa + 1) * (2 * kappa + 3))  # its fourth central moment
    assert abs((theta - 0.5).square().mean() - variance) <= 5 * math.sqrt((fourth - variance**2) / n) + 1e-12


@pytest.mark.parametrize(
    "x, other, kappa, error, says",
    [
        (torch.ones(2, 3), torch.ones(2, 4), 2.0, ValueError, "alike"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), 2.0, ValueError, "float64"),
        (torch.ones(2).long(), torch.ones(2).long(), 2.0, TypeError, "floating-point"),
        ([1.0], torch.ones(1), 2.0, TypeError, "list"),
        (torch.ones(2), torch.ones(2), 0.0, ValueError, "kappa"),
    ],
)
def test_mixup_refuses_what_it_cannot_mix(x, other, kappa, error, says):
    with pytest.raises(error, match=says):
        ce.momentum_mixup(x, other, kappa)


def test_schedule_runs_from_one_end_to_the_other():
    values = [ce.mu_schedule(step, 100, 0.5, 10.0) for step in range(101)]
    assert values[0] == 0.5 and values[-1] == pytest.approx(10.0) and values[50] == pytest.approx(5.25)
    assert all(a < b for a, b in itertools.pairwise(values))
    for step, total in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError, match="step"):
            ce.mu_schedule(step, total)
