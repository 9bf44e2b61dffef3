"""SupContrast's class: its definition, copies, what is refused."""

from __future__ import annotations

import pytest
import torch

from contrastive_ext.adapters.supcon import SupConLoss
from parity import assert_compiles, assert_same, assert_survives_copies
from rows import INPUTS

LABELS = torch.tensor([0, 3, 0, 5, 3, 0, 7])


def _features(kind: str = "random", views: int = 2) -> torch.Tensor:
    rows = INPUTS[kind](len(LABELS) * views, 5, torch.float64)[0]
    return torch.nn.functional.normalize(rows, dim=1).view(len(LABELS), views, 5)


def _host(features, mask, contrast_mode, temperature, base):
    """losses.py of SupContrast (current version), in float64 and without its 1e-9."""
    count, views, _ = features.shape
    contrast = torch.cat(features.unbind(1))
    anchor = features[:, 0] if contrast_mode == "one" else contrast
    logits = anchor @ contrast.T / temperature
    own = torch.eye(len(anchor), len(contrast), dtype=torch.bool)
    positive = mask.bool().repeat(len(anchor) // count, views) & ~own
    log_prob = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    pairs = positive.sum(1)
    mean = log_prob.where(positive, 0.0).sum(1) / pairs.where(pairs > 0, 1)
    return -(temperature / base) * mean.mean()


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("known", ["labels", "mask", "nothing"])
def test_same_as_its_definition(known, views, contrast_mode, kind):
    mask = LABELS[:, None] == LABELS if known != "nothing" else torch.eye(len(LABELS), dtype=torch.bool)
    given = {"labels": {"labels": LABELS}, "mask": {"mask": mask.float()}, "nothing": {}}[known]
    module = SupConLoss(0.1, contrast_mode, 0.07)
    assert_same(
        lambda x: module(x, **given), lambda x: _host(x, mask, contrast_mode, 0.1, 0.07), _features(kind, views)
    )


def test_further_axes_are_flattened():
    features = torch.randn(7, 2, 3, 2, dtype=torch.float64) / 6**0.5
    assert torch.equal(SupConLoss()(features, LABELS), SupConLoss()(features.flatten(2), LABELS))


def test_module_is_a_value():
    module = SupConLoss(0.2, "one", 0.1)
    assert_survives_copies(module, _features())
    assert_compiles(module, _features())
    assert repr(module) == "SupConLoss(temperature=0.2, contrast_mode='one', base_temperature=0.1)"


ASYMMETRIC = (LABELS[:, None] == LABELS).float().index_fill(1, torch.tensor([2]), 1.0)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ((torch.ones(4, 2),), ValueError, r"\[B, V, D\], views second; got"),
        ((None,), TypeError, "features must be a tensor"),
        ((_features(), LABELS, torch.eye(7)), ValueError, "labels or mask, not both"),
        ((_features(), None, ASYMMETRIC), ValueError, "as labels would say: .* give labels"),
        ((_features(), None, 0.5 * torch.eye(7)), ValueError, "as labels would say"),
        ((_features(), None, torch.zeros(7, 7)), ValueError, "as labels would say"),
        ((_features(), None, torch.eye(6)), ValueError, r"mask must be \[7, 7\]; got"),
        ((_features(), LABELS[:5]), ValueError, r"labels must be integers \[7\]"),
        ((_features(), LABELS.double()), ValueError, "labels must be integers"),
    ],
)
def test_refusals(arguments, error, says):
    with pytest.raises(error, match=says):
        SupConLoss()(*arguments)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"contrast_mode": "any"}, "contrast_mode must be one of all, one"),
        ({"base_temperature": -1.0}, "base_temperature must be > 0"),
    ],
)
def test_refused_options(options, says):
    with pytest.raises(ValueError, match=says):
        SupConLoss(**options)
