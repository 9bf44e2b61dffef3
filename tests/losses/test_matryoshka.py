"""A loss over prefixes of the features is the weighted sum of the loss of each, whatever else the call says."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from rows import USAGES, random_pairs

DIMS, WEIGHTS = (3, 8, 12), (1.0, 0.5, 2.0)
# negatives are cut with the rows; a queue is refused
PREFIXED = [usage for usage in USAGES if "queue" not in usage.name and usage.name != "moco"]


@pytest.mark.parametrize("usage", PREFIXED, ids=lambda u: u.name)
def test_prefixes_add_up(run, usage):
    backend, device = run
    z1, z2 = random_pairs(9, 12, torch.float64, device)
    z2, options = usage.options(z1, z2)
    leaves = [x.clone().requires_grad_() for x in (z1, z2)]
    row_loss = ce.Matryoshka(ce.HardNegative(0.05), DIMS, WEIGHTS)
    for name in (backend, "reference"):
        ours = ce.fused_row_loss(row_loss, *leaves, 0.4, backend=name, reduction="none", **options)
        expected = 0.0
        for dim, weight in zip(DIMS, WEIGHTS, strict=True):
            cut = {n: x[..., :dim] if n == "negatives" else x for n, x in options.items()}
            prefix = [x[:, :dim] for x in leaves]
            rows = ce.fused_hard_negative_loss(*prefix, 0.4, 0.05, backend=name, reduction="none", **cut)
            expected = expected + weight * rows
        torch.testing.assert_close(ours, expected)
        wanted = torch.autograd.grad(expected.sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), leaves), wanted)


def test_statistics_are_those_of_the_longest_prefix(run):
    backend, device = run
    z1, z2 = random_pairs(9, 12, device=device)
    loss, stats = ce.RowLossModule(ce.Matryoshka(ce.InfoNCE(), DIMS))(z1, z2, return_stats=True, backend=backend)
    expected = ce.fused_infonce_loss(z1, z2, return_stats=True, backend=backend)[1]
    assert stats.to_dict() == expected.to_dict()
    torch.testing.assert_close(loss, sum(ce.fused_infonce_loss(z1[:, :d], z2[:, :d], backend=backend) for d in DIMS))


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: ce.Matryoshka(ce.fused_infonce_loss, (2,)), TypeError, "must be a RowLoss"),
        (lambda: ce.Matryoshka(ce.InfoNCE(), ()), ValueError, "ascending"),
        (lambda: ce.Matryoshka(ce.InfoNCE(), (4, 2)), ValueError, "ascending"),
        (lambda: ce.Matryoshka(ce.InfoNCE(), (0, 2)), ValueError, "at least 1"),
        (lambda: ce.Matryoshka(ce.InfoNCE(), (2, 4), (1.0,)), ValueError, "one for each of 2 dims"),
        (lambda: ce.Matryoshka(ce.InfoNCE(), (2,), ("1",)), TypeError, "a weight must be a number"),
        (lambda: ce.fused_row_loss(ce.Matryoshka(ce.InfoNCE(), (2, 9)), *Z), ValueError, "at most 3"),
        (lambda: ce.fused_row_loss(ce.Matryoshka(ce.InfoNCE(), (2,)), *Z, queue=Z[0]), ValueError, "takes no queue"),
        (
            lambda: ce.fused_row_loss(ce.Matryoshka(ce.Matryoshka(ce.InfoNCE(), (3,)), (2, 3)), *Z),
            ValueError,
            "at most 2, the number of features",
        ),
        (
            lambda: ce.fused_row_loss(ce.Matryoshka(ce.Debiased(), (2,)), *Z, layout=("q2d", "q2q")),
            ValueError,
            "Debiased is not defined",
        ),
    ],
)
def test_what_it_refuses(make, error, says):
    with pytest.raises(error, match=says):
        make()


Z = torch.randn(2, 4, 3)
