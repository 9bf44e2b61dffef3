"""Losses whose formula is 0 are 0, not the rounding of a logit minus itself; so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import contrastive_ext as ce


def _part_filled_queue(keys: Tensor) -> ce.NegativeQueue:
    queue = ce.NegativeQueue(5, keys.shape[1], dtype=keys.dtype, device=keys.device)
    queue.enqueue(keys)
    return queue


def _alike(z: Tensor, other: Tensor) -> dict:
    """Name -> a call whose every loss is a logarithm of one."""
    labels, one = torch.zeros(2, dtype=torch.int64, device=z.device), other[:1]
    two_rows = torch.cat([z[:1], one])
    two_views, empty = two_rows[:, None], ce.NegativeQueue(5, z.shape[1], dtype=z.dtype, device=z.device)
    return {
        "soft targets, one key": lambda **o: ce.fused_soft_target_loss(z, one, other, teacher_temperature=0.1, **o),
        "soft targets, one key in a queue": lambda **o: ce.fused_soft_target_loss(
            z, _part_filled_queue(one), other, teacher_temperature=0.1, **o
        ),
        "soft targets, one key in two sets": lambda **o: ce.fused_soft_target_loss(
            z, one, other, teacher_temperature=0.1, queue=empty, **o
        ),
        "supcon out, one other row": lambda **o: ce.fused_supcon_loss(two_rows, labels, 0.03, "out", **o),
        "supcon in, one other row": lambda **o: ce.fused_supcon_loss(two_rows, labels, 0.03, "in", **o),
        "supcon, two views of one image": lambda **o: ce.fused_supcon_loss(two_views, labels[:1], 0.03, **o),
        "fnc, one image": lambda **o: ce.fused_false_negative_loss(two_views, 0.03, **o),
        "fnc, everything eliminated": lambda **o: ce.fused_false_negative_loss(
            torch.stack([z, other]), 0.03, mode="eliminate", top_k=None, threshold=-2.0, **o
        ),
        "one pair": lambda **o: ce.fused_debiased_loss(z[:1], one, 0.03, **o),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exactly_0(run, dtype):
    backend, device = run
    for dim in (1, 17, 129):
        z, other = torch.randn(2, 6, dim, dtype=torch.float64).to(device, dtype)
        z.requires_grad_()
        for name, call in _alike(z, other).items():
            for chosen in (backend, "reference"):
                loss = call(reduction="none", backend=chosen)
                (grad,) = torch.autograd.grad(loss.sum(), z)
                assert loss.eq(0).all(), (name, chosen, dim, loss)
                assert grad.eq(0).all(), (name, chosen, dim, grad)


def test_bad_numbers_reach_a_loss_of_0(run):
    backend, device = run
    z, other = torch.randn(2, 6, 3, device=device)
    z[0, 1] = torch.nan
    for name, call in _alike(z, other).items():
        for chosen in (backend, "reference"):
            assert call(reduction="sum", backend=chosen).isnan(), (name, chosen)


def test_one_key_has_no_entropy(run):
    backend, device = run
    z, teacher, key = (
        torch.randn(6, 17, device=device),
        torch.randn(6, 17, device=device),
        torch.randn(1, 17).to(device),
    )
    for chosen in (backend, "reference"):
        _, stats = ce.fused_soft_target_loss(
            z, key, teacher, teacher_temperature=0.1, return_stats=True, backend=chosen
        )  # fmt: skip
        assert stats.teacher_entropy == stats.student_entropy == stats.divergence == 0.0
