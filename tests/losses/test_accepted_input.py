"""What users have at hand and mean plainly: an empty queue, a scale of shape [1], a whole number for a parameter."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from rows import LOSSES, RANKED, random_pairs

B, D = 6, 4


@pytest.fixture
def pairs(run):
    return random_pairs(B, D, torch.float64, run[1])


@pytest.mark.parametrize("loss", LOSSES + RANKED, ids=lambda x: x.name)
def test_an_empty_queue_is_no_queue(run, pairs, loss):
    z1, z2 = pairs
    call = loss.parameters | loss.vectors(z1)
    guide = (z1[:, :2], z2[:, :2])
    ids, no_ids = torch.arange(B, device=z1.device) % 3, torch.zeros(0, dtype=torch.int64, device=z1.device)
    for backend in (run[0], "reference"):
        for options in ({}, {"layout": "one_way"}, {"layout": "symmetric"}, {"ids": ids}, {"guide": guide}):
            options = {**options, "backend": backend, "return_stats": True}
            for empty in (
                {"queue": z1[:0]},
                {"queue": ce.Columns(z1[:0], ids=no_ids)} if "ids" in options else {},
                {"queue": ce.Columns(z1[:0], guide=guide[0][:0])} if "guide" in options else {},
            ):
                ours, stats = loss.function(z1, z2, **call, **options, **empty)
                expected, expected_stats = loss.function(z1, z2, **call, **options)
                assert torch.equal(ours, expected), (options, empty)
                assert stats.to_dict() == expected_stats.to_dict()


def test_an_empty_queue_of_other_losses_is_no_queue(run, pairs):
    z1, z2 = pairs
    for backend in (run[0], "reference"):
        for call in (
            lambda **o: ce.fused_false_negative_loss(torch.stack([z1, z2]), **o),
            lambda **o: ce.fused_soft_target_loss(z1, z2, z2, teacher_temperature=0.1, **o),
            lambda queue=None, **o: ce.fused_self_labeling_loss(z1, z2, queue, **o),
        ):
            assert torch.equal(call(queue=z1[:0], backend=backend), call(backend=backend))


def test_a_loss_that_needs_a_queue_says_so():
    z = torch.randn(3, 2)
    with pytest.raises(ValueError, match="is no queue"):
        ce.fused_infonce_loss(z, z, layout="one_way", queue=z[:0], in_batch_negatives=False)
    with pytest.raises(ValueError, match="no key to compare with"):
        ce.fused_self_labeling_loss(z[:1], z[:1], z[:0])
    with pytest.raises(ValueError, match=r"keys must be \[., 2\] and not empty"):
        ce.fused_soft_target_loss(z, z[:0], z, teacher_temperature=0.1)


@pytest.mark.parametrize("name", ["temperature", "logit_scale"])
def test_a_learned_scale_may_have_shape_1(run, pairs, name):
    """FSDP shards no 0-d parameters: LogitScale's is [1] there."""
    z1, z2 = pairs
    labels = torch.arange(B, device=z1.device) % 3
    calls = [
        lambda **o: ce.fused_infonce_loss(z1, z2, **o),
        lambda **o: ce.fused_infonce_loss(z1, z2, queue=z1, **o),
        lambda **o: ce.fused_supcon_loss(z1, labels, **o),
        lambda **o: ce.fused_false_negative_loss(torch.stack([z1, z2]), **o),
    ]
    if name == "temperature":
        calls += [
            lambda **o: ce.fused_soft_target_loss(z1, z2, z2, teacher_temperature=0.1, **o),
            lambda **o: ce.fused_self_labeling_loss(z1, z2, None, **o),
        ]
    for backend in (run[0], "reference"):
        for call in calls:
            one, none = (torch.full(s, 0.7, device=z1.device, requires_grad=True) for s in ((1,), ()))
            ours, expected = call(backend=backend, **{name: one}), call(backend=backend, **{name: none})
            assert ours.shape == ()
            assert torch.equal(ours, expected)
            assert torch.equal(torch.autograd.grad(ours, one)[0][0], torch.autograd.grad(expected, none)[0])


def test_whole_numbers_are_numbers():
    z1, z2 = random_pairs(B, D)
    assert torch.equal(ce.fused_infonce_loss(z1, z2, 1), ce.fused_infonce_loss(z1, z2, 1.0))
    mixed, _, theta = ce.momentum_mixup(z1, z2, kappa=2)
    assert mixed.shape == z1.shape
    assert ((theta >= 0) & (theta <= 1)).all()
