"""The same numbers as the libraries users come from: their formulas in float64, the packages where installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from rows import random_pairs

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
T = 0.3


@pytest.fixture
def views(run):
    backend, device = run
    a, b = random_pairs(7, 5, torch.float64, device)
    return a, b, backend


def _two_view(a, b):
    z = F.normalize(torch.cat([a, b]))
    s, n = z @ z.T / T, 2 * len(a)
    index = torch.arange(n, device=a.device)
    partner = (index + n // 2) % n
    return s, index, partner


def test_lightly_and_pytorch_metric_learning_ntxent(views):
    a, b, backend = views
    s, index, partner = _two_view(a, b)
    own = F.one_hot(index).bool()
    expected = F.cross_entropy(s.masked_fill(own, -torch.inf), partner)
    torch.testing.assert_close(ce.fused_infonce_loss(a, b, T, backend=backend), expected, **CLOSE)


def test_pytorch_metric_learning_ntxent_one_way(views):
    a, b, backend = views
    s = F.normalize(a) @ F.normalize(b).T / T
    expected = F.cross_entropy(s, torch.arange(len(a), device=a.device))
    torch.testing.assert_close(ce.fused_infonce_loss(a, b, T, layout="one_way", backend=backend), expected, **CLOSE)


def test_lightly_ntxent_with_memory_bank(views):
    a, b, backend = views
    bank = F.normalize(torch.randn(11, 5, dtype=torch.float64, device=a.device))
    na, nb = F.normalize(a), F.normalize(b)
    logits = torch.cat([(na * nb).sum(1, keepdim=True), na @ bank.T], 1) / T
    expected = F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64, device=a.device))
    ours = ce.fused_infonce_loss(a, b, T, layout="one_way", queue=bank, in_batch_negatives=False, backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_lightly_decoupled(views):
    a, b, backend = views
    s, index, partner = _two_view(a, b)
    out = F.one_hot(index).bool() | F.one_hot(partner).bool()
    expected = (s.masked_fill(out, -torch.inf).logsumexp(1) - s[index, partner]).mean()
    torch.testing.assert_close(ce.fused_decoupled_loss(a, b, T, backend=backend), expected, **CLOSE)


def test_lightly_decoupled_weighted(views):
    a, b, backend = views
    s, index, partner = _two_view(a, b)
    out = F.one_hot(index).bool() | F.one_hot(partner).bool()
    weight = 2 - len(a) * ((F.normalize(a) * F.normalize(b)).sum(1) / 0.5).softmax(0)
    expected = (s.masked_fill(out, -torch.inf).logsumexp(1) - weight.repeat(2) * s[index, partner]).mean()
    ours = ce.fused_decoupled_loss(a, b, T, positive_weight=weight, backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_open_clip(views):
    a, b, backend = views
    a, b = F.normalize(a), F.normalize(b)
    scale = torch.tensor(14.0, dtype=torch.float64, device=a.device, requires_grad=True)
    target = torch.arange(len(a), device=a.device)
    expected = (F.cross_entropy(scale * a @ b.T, target) + F.cross_entropy(scale * b @ a.T, target)) / 2
    (expected_grad,) = torch.autograd.grad(expected, scale)
    ours = ce.fused_infonce_loss(a, b, logit_scale=scale, layout="symmetric", normalize=False, backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(ours, scale)[0], expected_grad, **CLOSE)


def test_sentence_transformers_multiple_negatives_ranking(views):
    a, b, backend = views
    triplets = torch.cat([b, torch.randn_like(b)])  # positives, then one explicit negative for each anchor
    expected = F.cross_entropy(20 * F.normalize(a) @ F.normalize(triplets).T, torch.arange(len(a), device=a.device))
    ours = ce.fused_infonce_loss(a, triplets, logit_scale=20.0, layout="one_way", backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_info_nce(views, mode):
    a, b, backend = views
    na, nb = F.normalize(a), F.normalize(b)
    negatives = torch.randn(*((9,) if mode == "unpaired" else (7, 3)), 5, dtype=torch.float64, device=a.device)
    nn = F.normalize(negatives, dim=-1)
    negative_logits = na @ nn.T if mode == "unpaired" else torch.einsum("bd,bnd->bn", na, nn)
    logits = torch.cat([(na * nb).sum(1, keepdim=True), negative_logits], 1) / T
    expected = F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64, device=a.device))
    ours = ce.fused_infonce_loss(
        a, b, T, layout="one_way", negatives=negatives, in_batch_negatives=False, backend=backend
    )
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_mocov3_up_to_its_factor(views):
    a, b, backend = views
    s = F.normalize(a) @ F.normalize(b).T / T
    expected = 2 * T * F.cross_entropy(s, torch.arange(len(a), device=a.device))
    ours = 2 * T * ce.fused_infonce_loss(a, b, T, layout="one_way", backend=backend)
    torch.testing.assert_close(ours, expected, **CLOSE)


def _installed(package: str):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed; its formula is tested above")


@_installed("pytorch_metric_learning")
def test_package_pytorch_metric_learning():
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    a, b = random_pairs(16, 8)
    theirs = SelfSupervisedLoss(NTXentLoss(temperature=T))(a, b)
    torch.testing.assert_close(ce.fused_infonce_loss(a, b, T), theirs)
    theirs = SelfSupervisedLoss(NTXentLoss(temperature=T), symmetric=False)(a, b)
    torch.testing.assert_close(ce.fused_infonce_loss(a, b, T, layout="one_way"), theirs)


@_installed("info_nce")
def test_package_info_nce():
    from info_nce import InfoNCE

    a, b = random_pairs(16, 8)
    torch.testing.assert_close(ce.fused_infonce_loss(a, b, T, layout="one_way"), InfoNCE(temperature=T)(a, b))
