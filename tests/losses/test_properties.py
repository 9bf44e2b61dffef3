"""What must hold whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.numerics import logsumexp_pair
from rows import LOSSES, random_pairs

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture
def pairs(run):
    backend, device = run
    z1, z2 = random_pairs(13, 6, torch.float64, device)
    return z1.requires_grad_(), z2.requires_grad_(), backend


def _with_gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def _assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_debiased_without_prior_is_infonce(pairs):
    z1, z2, backend = pairs
    debiased = ce.fused_debiased_loss(z1, z2, tau_plus=0.0, backend=backend)
    infonce = ce.fused_infonce_loss(z1, z2, backend=backend)
    _assert_same(_with_gradients(debiased, z1, z2), _with_gradients(infonce, z1, z2))


@pytest.mark.parametrize("detach_weights", [False, True])
def test_hard_without_concentration_is_debiased(pairs, detach_weights):
    z1, z2, backend = pairs
    hard = ce.fused_hard_negative_loss(z1, z2, beta=0.0, detach_weights=detach_weights, backend=backend)
    debiased = ce.fused_debiased_loss(z1, z2, backend=backend)
    _assert_same(_with_gradients(hard, z1, z2), _with_gradients(debiased, z1, z2))


def test_hard_with_vanishing_concentration_tends_to_debiased(pairs):
    z1, z2, backend = pairs
    hard = ce.fused_hard_negative_loss(z1, z2, beta=1e-9, backend=backend)
    torch.testing.assert_close(hard, ce.fused_debiased_loss(z1, z2, backend=backend), rtol=1e-8, atol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_hard_with_one_negative_is_debiased(run, beta):
    backend, device = run
    z1, z2 = random_pairs(2, 6, torch.float64, device)
    call = {"layout": "one_way", "backend": backend}
    hard = ce.fused_hard_negative_loss(z1, z2, beta=beta, **call)
    torch.testing.assert_close(hard, ce.fused_debiased_loss(z1, z2, **call), **CLOSE)


def test_partner_given_as_positives_changes_nothing(pairs):
    z1, z2, backend = pairs
    plain = ce.fused_debiased_loss(z1, z2, layout="one_way", backend=backend)
    given = ce.fused_debiased_loss(z1, z2, positives=z2[None], layout="one_way", backend=backend)
    _assert_same(_with_gradients(given, z1, z2), _with_gradients(plain, z1, z2))


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.name in ("infonce", "decoupled", "debiased", "hard")], ids=lambda x: x.name
)
@pytest.mark.parametrize("layout", ["two_view", "symmetric"])
def test_swapping_the_views_changes_nothing(pairs, loss, layout):
    z1, z2, backend = pairs
    call = loss.parameters | {"layout": layout, "backend": backend}
    one, two = loss.function(z1, z2, **call), loss.function(z2, z1, **call)
    _assert_same(_with_gradients(one, z1, z2), _with_gradients(two, z1, z2))


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.name in ("infonce", "decoupled", "debiased", "hard")], ids=lambda x: x.name
)
@pytest.mark.parametrize("layout", ["two_view", "one_way", "symmetric"])
def test_order_of_the_images_changes_nothing(pairs, loss, layout):
    z1, z2, backend = pairs
    order = torch.randperm(len(z1), device=z1.device)
    call = loss.parameters | {"layout": layout, "backend": backend}
    shuffled = loss.function(z1[order], z2[order], **call)
    _assert_same(_with_gradients(shuffled, z1, z2), _with_gradients(loss.function(z1, z2, **call), z1, z2))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_rotating_the_embedding_changes_nothing(pairs, loss):
    z1, z2, backend = pairs
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, device=z1.device))[0]
    if loss.vectors(z1.detach()):
        pytest.skip("its further inputs would have to turn along")
    call = loss.parameters | {"backend": backend}
    torch.testing.assert_close(
        loss.function(z1 @ rotation, z2 @ rotation, **call), loss.function(z1, z2, **call), **CLOSE
    )


@pytest.mark.parametrize("exponents", [(1.0,), (0.7, 1.7)])
def test_statistics_of_chunks_merge_to_those_of_the_whole(run, exponents):
    backend, device = run
    u, v = torch.randn(9, 5, device=device).double(), torch.randn(30, 5, device=device).double()
    call = {"scale": 2.0, "exponents": exponents, "backend": backend}
    whole = row_stats_lse(u, v, **call)
    chunks = [row_stats_lse(u, part, **call) for part in v.split([1, 12, 17])]
    merged = logsumexp_pair(logsumexp_pair(chunks[0], chunks[1]), chunks[2])
    torch.testing.assert_close(merged, whole, **CLOSE)


def row_stats_lse(u, v, **call):
    return ce.row_stats(u, v, **call).lse


def test_a_queue_equals_more_columns(run):
    backend, device = run
    z1, z2 = random_pairs(7, 5, torch.float64, device)
    queue = torch.nn.functional.normalize(torch.randn(11, 5, dtype=torch.float64, device=device))
    z1.requires_grad_()
    call = {"layout": "one_way", "backend": backend}
    for function in (ce.fused_infonce_loss, ce.fused_debiased_loss, ce.fused_hard_negative_loss):
        with_queue = function(z1, z2, queue=queue, **call)
        with_columns = function(z1, torch.cat([z2, queue]), **call)
        _assert_same(_with_gradients(with_queue, z1), _with_gradients(with_columns, z1))


def test_infonce_is_cross_entropy(run):
    backend, device = run
    z1, z2 = random_pairs(8, 5, torch.float64, device)
    unit1, unit2 = (torch.nn.functional.normalize(z) for z in (z1, z2))
    logits = unit1 @ unit2.T / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(8, device=device))
    ours = ce.fused_infonce_loss(z1, z2, 0.2, layout="one_way", backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.name in ("infonce", "debiased", "hard")], ids=lambda x: x.name)
def test_temperature_as_float_or_tensor_is_the_same(pairs, loss):
    z1, z2, backend = pairs
    tensor = torch.tensor(0.5, dtype=torch.float64, device=z1.device)
    call = loss.parameters | {"backend": backend}
    assert torch.equal(loss.function(z1, z2, 0.5, **call), loss.function(z1, z2, tensor, **call))


def test_detaching_the_weights_changes_the_gradient_only(pairs):
    z1, z2, backend = pairs
    free = _with_gradients(ce.fused_hard_negative_loss(z1, z2, backend=backend), z1, z2)
    held = _with_gradients(ce.fused_hard_negative_loss(z1, z2, detach_weights=True, backend=backend), z1, z2)
    torch.testing.assert_close(free[0], held[0], **CLOSE)
    assert (free[1] - held[1]).norm() > 0.01 * free[1].norm()
