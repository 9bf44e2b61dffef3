"""The schedule of the Bayesian loss's alpha, and its estimate from labelled features."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from rows import random_pairs


def test_alpha_of_the_schedule_runs_in_a_line_and_stays():
    assert ce.linear_alpha(0) == 0.501
    assert ce.linear_alpha(10, 0.9) == pytest.approx((0.501 + 0.9) / 2)
    assert ce.linear_alpha(20, 0.9) == ce.linear_alpha(500, 0.9) == pytest.approx(0.9)
    module, (z1, z2) = ce.BayesianLoss(0.5, alpha=0.9), random_pairs(6, 4)
    assert torch.equal(module(z1, z2, alpha=0.7), ce.fused_bayesian_loss(z1, z2, 0.5, alpha=0.7))
    for wrong in ({"step": -1}, {"step": 0, "steps": 0}, {"step": 0, "alpha": 0.2}):
        with pytest.raises(ValueError):
            ce.linear_alpha(**wrong)


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_estimated_alpha_is_the_macro_auc(block, monkeypatch):
    monkeypatch.setattr("contrastive_ext.training.alpha._BLOCK_ELEMENTS", block)
    labels = torch.randint(0, 4, (30,))
    labels[7] = 9  # alone in its class: no positives, not counted
    features = torch.randn(30, 3) + torch.nn.functional.one_hot(labels % 3, 3)
    features[:6] = features[0]  # ties
    unit = torch.nn.functional.normalize(features)
    cosine = unit @ unit.T
    areas = []
    for i in range(30):
        others = torch.arange(30) != i
        same, other = (cosine[i][others & mask] for mask in (labels == labels[i], labels != labels[i]))
        if len(same):
            wins = (same[:, None] > other).double() + 0.5 * (same[:, None] == other).double()
            areas.append(wins.mean())
    assert ce.estimate_alpha(features, labels) == pytest.approx(torch.stack(areas).mean().item(), abs=2e-3)
    assert ce.estimate_alpha(torch.eye(4), torch.tensor([0, 1, 0, 1])) == 0.5
    perfect = torch.eye(2).repeat(3, 1)
    assert ce.estimate_alpha(perfect, torch.arange(6) % 2) == 1.0


def test_estimating_alpha_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="macro-AUC needs"):
        ce.estimate_alpha(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"integers \[4\]"):
        ce.estimate_alpha(torch.randn(4, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        ce.estimate_alpha(torch.randn(4), torch.zeros(4, dtype=torch.int64))
