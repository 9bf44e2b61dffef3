"""The limit of a guide: what lies at it is kept however it rounds, what lies above is cancelled whatever its sign."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from contrastive_ext import numerics

PAIRS = 4
WIDTHS = [1, 3, 17, 64, 384, 768]  # of the guide: up to two chunks of features and more


def _kept(guide: ce.Guide, **options) -> list[set[int]]:
    """The columns that the guide leaves every anchor: column j has the exponential 2^j, their sum is a bit mask."""
    g1, g2 = guide.g1, guide.g2
    exponent = torch.arange(len(g2), dtype=g1.dtype, device=g1.device)[:, None]
    one = torch.ones(len(g1), 1, dtype=g1.dtype, device=g1.device)
    rows = ce.fused_decoupled_loss(
        one, exponent, 1 / math.log(2), layout="one_way", guide=guide, normalize=False, reduction="none", **options
    )
    sums = (rows.double() / math.log(2) + torch.arange(len(g1), device=g1.device)).exp2().round().long().tolist()
    # an anchor without negatives has loss 0: the bit of its own positive
    return [{j for j in range(len(g2)) if mask >> j & 1} - {i} for i, mask in enumerate(sums)]


def _every_backend(run) -> list[str]:
    return [run[0], "reference"]


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_duplicates_of_the_positive_are_kept_at_margin_0_and_cancelled_at_any_other(
    run, width, dtype, margin, strategy
):
    device = run[1]
    g1 = torch.randn(PAIRS, width, dtype=torch.float64)
    positive = g1 + 0.3 * torch.randn(PAIRS, width, dtype=torch.float64)
    g1, g2 = g1.to(device, dtype), torch.cat([positive, positive, 3.7 * positive]).to(device, dtype)
    cosine = F.normalize(g1.double()) @ F.normalize(g2.double()).T
    own = cosine.diagonal()[:, None]
    limit = own - margin * (own.abs() if strategy == "relative" else 1.0)
    near = 2 * numerics.rounding_of_products(dtype, width)  # what lies this near to a limit may go either way
    certainly, possibly = cosine < limit - near, cosine <= limit + near
    for i in range(PAIRS):
        copies = [i + PAIRS, i + 2 * PAIRS]
        certainly[i, copies] = possibly[i, copies] = margin == 0.0
        certainly[i, i] = possibly[i, i] = False
    for backend in _every_backend(run):
        for i, kept in enumerate(_kept(ce.Guide(g1, g2, margin, strategy == "relative"), backend=backend)):
            assert set(certainly[i].nonzero().flatten().tolist()) <= kept, (backend, i)
            assert kept <= set(possibly[i].nonzero().flatten().tolist()), (backend, i)


def test_a_collapsed_guide_cancels_nothing(run):
    """Every score is at the limit, in every layout and in the queue."""
    device = run[1]
    z1, z2 = torch.randn(2, 40, 5, device=device)
    same = torch.randn(33, device=device).expand(40, -1)
    keys = F.normalize(torch.randn(40, 5, device=device))
    for backend in _every_backend(run):
        for options in (
            {},
            {"layout": "one_way"},
            {"layout": "symmetric"},
            {"queue": ce.Columns(keys, guide=5 * same)},
        ):
            how = options | {"guide": (same, 2 * same), "return_stats": True}
            guided = ce.fused_infonce_loss(z1, z2, backend=backend, **how)[1]
            assert guided.cancelled_fraction == 0.0, (backend, options)


def test_a_relative_margin_lowers_a_negative_limit_too(run):
    """A positive at -.5 and margin .3: the limit is -.65, which cancels -.4 and -.64 and keeps -.66."""
    device = run[1]
    cosine = torch.tensor([-0.5, -0.4, -0.64, -0.66], dtype=torch.float64, device=device)
    g1 = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device)
    g2 = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
    for backend in _every_backend(run):
        assert _kept(ce.Guide(g1, g2, 0.3, relative=True), backend=backend) == [{3}]
        assert _kept(ce.Guide(-g1, g2, 0.3, relative=True), backend=backend) == [set()]
        assert _kept(ce.Guide(g1, g2, 0.15), backend=backend) == [{3}]
