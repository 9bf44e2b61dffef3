"""`out_against`: labelled rows among labelled columns alone, on every backend, against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ext import numerics
from contrastive_ext.losses.supcon import out_against
from rows import INPUTS

LABELS = torch.tensor([0, 3, 0, 5, 3, 0, 7, -2])
COLUMNS = torch.tensor([3, 0, 9, 3, 5, 0, -2, 9, 0, 4, 3])  # one positive for 5 and -2, none for 7


def _dense(z: Tensor, labels: Tensor, v: Tensor, column_labels: Tensor, scale: float, own: bool) -> Tensor:
    logits = scale * z @ v.T
    out = torch.eye(*logits.shape, dtype=torch.bool, device=z.device) if own else torch.zeros_like(logits).bool()
    positive = (labels[:, None] == column_labels) & ~out
    number = positive.sum(1)
    mean = logits.where(positive, 0.0).sum(1) / number.clamp(min=1)
    return torch.where(number > 0, logits.masked_fill(out, -torch.inf).logsumexp(1) - mean, 0.0 * mean)


def _case(kind: str, own: bool, dtype: torch.dtype, device):
    column_labels = torch.cat([LABELS, COLUMNS]) if own else COLUMNS
    z, v = (F.normalize(x, dim=1).to(dtype) for x in INPUTS[kind](len(column_labels), 6, torch.float64, device))
    z = z[: len(LABELS)]
    v = torch.cat([z, v[len(LABELS) :]]) if own else v
    return z, LABELS.to(device), v, column_labels.to(device)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_matches_the_definition(run, kind, own):
    backend, device = run
    z, labels, v, column_labels = _case(kind, own, torch.float64, device)
    inputs = z.requires_grad_(), v.detach().requires_grad_()
    rows, number = out_against(
        inputs[0], labels, inputs[1], column_labels, 7.0, own=own, unit=kind != "degenerate", backend=backend
    )
    expected = _dense(inputs[0], labels, inputs[1], column_labels, 7.0, own)
    assert number.tolist() == ((labels[:, None] == column_labels).sum(1) - int(own)).tolist()
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(rows)
    got, wanted = (torch.autograd.grad(x, inputs, upstream) for x in (rows, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("own", [False, True])
def test_a_single_positive_keeps_its_digits(run, own):
    """Converged rows with one positive are InfoNCE: the positive stands outside the sum."""
    backend, device = run
    count, t = 12, 0.05
    labels = torch.arange(count, device=device)
    centers = torch.eye(16, dtype=torch.float64, device=device)[:count]
    noise = 0.02 * torch.randn(2, count, 16, dtype=torch.float64).to(device)
    z, v = F.normalize(centers + noise, dim=-1).float()
    columns, column_labels = (torch.cat([z, v]), labels.repeat(2)) if own else (v, labels)

    def gradient(z: Tensor, columns: Tensor, function) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(function(z, columns).sum(), z)[0]

    ours = gradient(
        z,
        columns,
        lambda z, v: out_against(z, labels, v, column_labels, 1 / t, own=own, unit=True, backend=backend)[0],
    )
    truth = gradient(z.double(), columns.double(), lambda z, v: _dense(z, labels, v, column_labels, 1 / t, own))
    # every weight is the exponential of a difference of two logits
    error = (ours.double() - truth).norm() / truth.norm()
    assert error < 2 * numerics.rounding_of_products(torch.float32, 16) / t


def test_bad_numbers_reach_the_loss(run):
    backend, device = run
    z, labels, v, column_labels = _case("random", False, torch.float64, device)
    for at in (0, 6):  # a row with positives, one without
        spoiled = z.clone()
        spoiled[at, 1] = torch.nan
        rows, _ = out_against(spoiled, labels, v, column_labels, 7.0, own=False, unit=True, backend=backend)
        assert rows[at].isnan()
