"""Bounds of the supervised loss: the authors' released code, limits that are known, and the theorem itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
import golden_files
from contrastive_ext.theory import (
    BoundTerms,
    SupervisedBound,
    collision_probability,
    coverage_probability,
    expected_log_collisions,
)

FLOAT32_EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("case", golden_files.cases("nozawa_bound"), ids=lambda case: case["case"])
def test_every_term_matches_the_released_code(case):
    golden = golden_files.load("nozawa_bound", case)
    bound = SupervisedBound(case["C"], case["t"])
    for z0, z1, means, labels in zip(golden["z0"], golden["z1"], golden["meanz"], golden["labels"], strict=True):
        bound.update(z0, z1, labels, class_means=golden["mu"], augmentation_means=means)
    terms = bound.compute()

    for got, name in (
        (terms.contrastive_loss, "SimCLR_loss"),
        (terms.two_view_loss, "Original_SimCLR_loss"),
        (terms.coverage, "upsilon"),
        (terms.supervised_term, "sup_loss"),
        (terms.partial_term, "partial_sup_loss"),
        (terms.gap, "assumption_value"),
        (terms.collision, "curl_tau"),
        (terms.unique_supervised, "curl_sup_loss"),
        (terms.unique_supervised + terms.unique_partial, "curl_partial_sup_loss"),
    ):
        assert got == pytest.approx(case[name], rel=1e-12, abs=1e-14), name
    for got, name in (  # the released code takes the logarithms of the counts in float32, and leaves the gap out
        (terms.collision_term, "conflict_term"),
        (terms.lower_bound - terms.gap, "bound"),
        (terms.arora_lower_bound - terms.gap, "curl_bound"),
    ):
        assert got == pytest.approx(case[name], rel=FLOAT32_EPS), name


@pytest.mark.parametrize("case", golden_files.cases("nozawa_ntxent"), ids=lambda case: case["case"])
def test_multi_view_loss_matches_the_released_code(run, case):
    """V views: every ordered pair of views is anchor and positive, all other images in all views are negatives."""
    backend, device = run
    golden = golden_files.load("nozawa_ntxent", case)
    views = golden["views"].to(device).requires_grad_()
    num_views, num_images = views.shape[:2]
    z = F.normalize(views, dim=2)
    rows = z.flatten(0, 1)
    swept = ce.row_stats(rows, scale=1 / case["t"], num_images=num_images, unit=True, backend=backend)
    lse = swept.lse[0].view(num_views, num_images)
    positive = torch.einsum("and,bnd->abn", z, z) / case["t"]
    losses = F.softplus(lse[:, None] - positive, threshold=100)
    loss = losses[~torch.eye(num_views, dtype=torch.bool, device=device)].mean()
    loss.backward()

    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    difference = (views.grad.cpu() - golden["grad"]).abs().max()
    assert difference <= 1e-12 * golden["grad"].abs().max()
    single = ce.fused_infonce_loss(views[0], views[1], case["t"], layout="one_way", backend=backend)
    assert single.item() == pytest.approx(case["loss_single_view_negative"], rel=1e-12)


def a_population(num_images=60, num_augmentations=8, dim=6, seed=0):
    """Views [V, n, D] of unit length, labels [n] of four classes, 4 : 3 : 2 : 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) * 10 // num_images
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])[labels]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = 1.5 * normal(4, dim)[labels] + 0.4 * normal(num_images, dim)
    return F.normalize(images + 0.4 * normal(num_augmentations, num_images, dim), dim=2), labels


def a_batch(views, labels, size, generator):
    chosen = torch.randint(len(labels), (size,), generator=generator)
    first, second = (torch.randint(len(views), (size,), generator=generator) for _ in range(2))
    return views[first, chosen], views[second, chosen], labels[chosen], views.mean(0)[chosen]


def measured(size, num_batches, temperature=0.5, seed=1):
    """The mean of the terms over batches, and those of every batch."""
    views, labels = a_population()
    class_means = torch.stack([views[:, labels == c].mean((0, 1)) for c in range(4)])
    generator = torch.Generator().manual_seed(seed)
    bound, single = SupervisedBound(4, temperature), []
    for _ in range(num_batches):
        z1, z2, y, means = a_batch(views, labels, size, generator)
        bound.reset()
        bound.update(z1, z2, y, class_means=class_means, augmentation_means=means)
        single.append(bound.compute())
    names = BoundTerms.__dataclass_fields__
    mean = BoundTerms(**{name: math.fsum(getattr(t, name) for t in single) / num_batches for name in names})
    return mean, single, labels.bincount()


@pytest.mark.parametrize("size", [4, 8, 32, 128])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_bounds_hold_on_a_population_whose_means_are_known(size, temperature):
    terms, single, _ = measured(size, 1200 // size, temperature)
    for name in ("lower_bound", "arora_lower_bound"):
        slack = torch.tensor([t.contrastive_loss - getattr(t, name) for t in single])
        assert float(slack.mean()) > -5 * float(slack.std()) / math.sqrt(len(slack)), name
    assert terms.supervised_loss <= terms.upper_bound
    if terms.coverage:
        assert terms.supervised_term / terms.coverage <= terms.upper_bound
    assert terms.supervised_loss <= terms.arora_upper_bound
    if terms.unique_coverage:
        assert terms.unique_supervised / terms.unique_coverage <= terms.arora_upper_bound


@pytest.mark.parametrize("size", [5, 12, 40])
def test_batches_contain_what_the_coupon_collector_expects(size):
    terms, single, counts = measured(size, 600)
    for name, expected in (
        ("coverage", coverage_probability(size, prior=counts)),
        ("collision", collision_probability(size - 1, counts)),
        ("collision_term", expected_log_collisions(size - 1, counts)),
    ):
        samples = torch.tensor([getattr(t, name) for t in single])
        standard_error = float(samples.std()) / math.sqrt(len(samples))
        assert getattr(terms, name) == pytest.approx(float(expected), abs=5 * standard_error), name


def test_upper_bounds_are_the_lower_bounds_solved_for_the_supervised_loss():
    terms = measured(12, 50)[0]
    at_bound = replace(terms, supervised_term=terms.upper_bound * terms.coverage)
    assert at_bound.lower_bound == pytest.approx(terms.contrastive_loss, rel=1e-12)
    at_bound = replace(terms, unique_supervised=terms.arora_upper_bound * terms.unique_coverage)
    assert at_bound.arora_lower_bound == pytest.approx(terms.contrastive_loss, rel=1e-12)


def test_bounds_without_information_are_infinite():
    views, labels = a_population()
    bound = SupervisedBound(4, 0.5)
    for size in (3, 80):  # too few for four classes; so many that every class is there more than once
        bound.reset()
        z1, z2, y, means = a_batch(views, labels, size, torch.Generator().manual_seed(0))
        bound.update(z1, z2, y, class_means=torch.randn(4, 6), augmentation_means=means)
        terms = bound.compute()
        assert (terms.upper_bound == math.inf) == (size == 3)
        assert terms.arora_upper_bound == math.inf


def test_collapsed_encoder_pays_the_collision_term_and_nothing_else():
    z = torch.ones(7, 3)
    bound = SupervisedBound(1, 0.3)
    bound.update(
        z, z, torch.zeros(7, dtype=torch.int64), class_means=F.normalize(z[:1]), augmentation_means=F.normalize(z)
    )
    terms = bound.compute()
    assert terms.contrastive_loss == pytest.approx(math.log(7), rel=1e-12)
    assert terms.arora_lower_bound == pytest.approx(math.log(7), rel=1e-12)
    assert (terms.supervised_loss, terms.coverage, terms.collision, terms.accuracy) == (0, 1, 1, 1)
    assert terms.gap == pytest.approx(0, abs=1e-15)


def test_batches_are_weighted_by_their_anchors():
    views, labels = a_population()
    class_means = torch.randn(4, 6)
    generator = torch.Generator().manual_seed(3)
    parts, both = [], SupervisedBound(4, 0.5)
    for size in (30, 10):
        z1, z2, y, means = a_batch(views, labels, size, generator)
        alone = SupervisedBound(4, 0.5)
        for bound in (alone, both):
            bound.update(z1.float(), z2.float(), y, class_means=class_means, augmentation_means=means.float())
        parts.append(alone.compute())
    for name in BoundTerms.__dataclass_fields__:
        expected = 0.75 * getattr(parts[0], name) + 0.25 * getattr(parts[1], name)
        assert getattr(both.compute(), name) == pytest.approx(expected, rel=1e-12, abs=1e-15), name
    both.reset()
    with pytest.raises(RuntimeError, match="update"):
        both.compute()


def test_nan_reaches_the_terms_it_concerns():
    z = torch.randn(5, 3)
    z[2] = torch.nan
    bound = SupervisedBound(2, 0.5)
    labels = torch.tensor([0, 1, 0, 1, 0])
    bound.update(z, z, labels, class_means=torch.randn(2, 3), augmentation_means=z)
    terms = bound.compute()
    assert math.isnan(terms.contrastive_loss) and math.isnan(terms.supervised_loss) and math.isnan(terms.gap)
    assert math.isnan(terms.lower_bound) and math.isnan(terms.upper_bound)
    assert terms.coverage == 1


def test_bad_arguments_are_refused():
    for num_classes in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_classes"):
            SupervisedBound(num_classes, 0.5)
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            SupervisedBound(3, temperature)
    bound = SupervisedBound(3, 0.5)
    z, labels, mu = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), torch.randn(3, 2)
    good = {"z1": z, "z2": z, "labels": labels, "class_means": mu, "augmentation_means": z}
    for error, message, bad in (
        (ValueError, "same shape", {"z2": z[:3]}),
        (ValueError, "same shape", {"augmentation_means": z[:, :1]}),
        (ValueError, "same shape", {"z1": z[:0], "z2": z[:0], "augmentation_means": z[:0]}),
        (ValueError, "class_means", {"class_means": mu[:2]}),
        (TypeError, "int64", {"labels": labels.float()}),
        (TypeError, "int64", {"labels": labels[:2]}),
        (ValueError, r"\[0, 3\)", {"labels": labels + 3}),
        (ValueError, r"\[0, 3\)", {"labels": labels - 1}),
    ):
        with pytest.raises(error, match=message):
            bound.update(**{**good, **bad})
    with pytest.raises(RuntimeError):  # a refused batch leaves no trace
        bound.compute()
