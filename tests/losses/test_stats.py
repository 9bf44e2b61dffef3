"""`return_stats`: the record against a direct computation, the same from every backend, and no wait for the device."""

from __future__ import annotations

import warnings

import pytest
import torch

import contrastive_ext as ce
from promises import check_statistics
from rows import LOSSES, RANKED, USAGES, peaked_pairs, random_pairs


@pytest.mark.parametrize("usage", USAGES, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_backends_report_what_the_reference_reports(run, loss, usage):
    check_statistics(run, loss, usage)


def test_record_matches_its_definition():
    z1, z2 = peaked_pairs(20, 6, torch.float64)
    z1[0] = -z2[0]  # one anchor pair that is wrong
    _, stats = ce.fused_infonce_loss(z1, z2, 0.5, return_stats=True)
    z = torch.nn.functional.normalize(torch.cat([z1, z2]))
    s, n = z @ z.T, len(z)
    positive = s[torch.arange(n), (torch.arange(n) + n // 2) % n]
    same = torch.arange(n)[:, None] % (n // 2) == torch.arange(n)[None, :] % (n // 2)
    hardest = s.masked_fill(same, -2).amax(1)
    weight = torch.exp(s / 0.5).masked_fill(same, 0)
    expected = {
        "accuracy": (positive > hardest).double().mean(),
        "positive_similarity": positive.mean(),
        "negative_similarity": s[~same].mean(),
        "hardest_negative": hardest.mean(),
        "effective_negatives": (weight.sum(1) ** 2 / (weight**2).sum(1)).mean(),
        "mean_weight": 1.0,
        "max_weight": 1.0,
        "clamped_fraction": 0.0,
        "cancelled_fraction": 0.0,
        "empty_rows": 0.0,
    }
    assert stats.to_dict() == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-10, abs=1e-12)


def test_clamped_rows_are_reported_and_warned_about_once(run):
    backend, device = run
    z1, z2 = peaked_pairs(40, 16, torch.float32, device)
    with pytest.warns(UserWarning, match="floor of the debiased loss"):
        _, stats = ce.fused_debiased_loss(z1, z2, 0.1, return_stats=True, backend=backend)
        stats.to_dict()
    assert stats.clamped_fraction == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ce.fused_debiased_loss(z1, z2, 0.1, backend=backend)


def test_clamped_rows_are_those_without_gradient_to_negatives():
    z1, z2 = peaked_pairs(12, 4, torch.float64)
    z1[:6], z2[:6] = random_pairs(6, 4, torch.float64)
    stats = ce.fused_debiased_loss(z1, z2, 0.35, return_stats=True, layout="one_way")[1]
    z2 = z2.requires_grad_()
    without_pull = 0
    rows = ce.fused_debiased_loss(z1, z2, 0.35, reduction="none", layout="one_way")
    for i, row in enumerate(rows):
        (grad,) = torch.autograd.grad(row, z2, retain_graph=True)
        grad[i] = 0
        without_pull += bool(grad.abs().max() < 1e-14)
    assert 0 < without_pull < 12
    assert stats.clamped_fraction.item() == pytest.approx(without_pull / 12)


def test_statistics_carry_no_gradient():
    z1, z2 = (z.requires_grad_() for z in random_pairs(5, 4))
    _, stats = ce.fused_hard_negative_loss(z1, z2, return_stats=True)
    assert not any(x.requires_grad for x in vars(stats).values() if isinstance(x, torch.Tensor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_nothing_waits_for_the_gpu(run, loss):
    backend, device = run
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for on the CPU")
    z1, z2 = (z.requires_grad_() for z in random_pairs(64, 32, torch.float32, device))
    queue = ce.NegativeQueue(64, 32, device=device)
    temperature = torch.tensor(0.5, device=device, requires_grad=True)
    vectors = loss.vectors(z1.detach())
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, _ = loss.function(
            z1, z2, temperature, queue=queue, return_stats=True, backend=backend, **loss.parameters, **vectors
        )
        value.backward()
        queue.enqueue(z2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_of_float64_are_float64_without_a_graph_under_a_learned_temperature(run):
    backend, device = run
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    z1, z2 = (z.requires_grad_() for z in random_pairs(7, 4, torch.float64, device))
    queue, labels = torch.randn(5, 4, dtype=torch.float64, device=device), torch.arange(7, device=device) % 3
    options = {"return_stats": True}
    for name in (backend, "reference"):
        options["backend"] = name
        records = [
            *(x.function(z1, z2, t, **options, **x.parameters, **x.vectors(z1)) for x in LOSSES + RANKED),
            ce.fused_supcon_loss(torch.stack([z1, z2]), labels, t, **options),
            ce.fused_false_negative_loss(torch.stack([z1, z2]), t, labels=labels, **options),
            ce.fused_soft_target_loss(z1, queue, z2, t, teacher_temperature=0.1, **options),
            ce.fused_self_labeling_loss(z1, z2, queue, z1, labels, 0.3, t, **options),
        ]
        for loss, stats in records:
            assert loss.requires_grad
            fields = {field: x for field, x in vars(stats).items() if isinstance(x, torch.Tensor)}
            assert not [field for field, x in fields.items() if x.requires_grad], (name, type(stats).__name__)
            assert {x.dtype for x in fields.values()} <= {torch.float64, torch.int64}, (name, type(stats).__name__)
