"""Coverage, collisions and what follows from them: exact arithmetic, other algorithms and simulation agree."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import golden_files
from contrastive_ext.theory import (
    collision_probability,
    coverage_probability,
    expected_draws,
    expected_log_collisions,
    false_negative_rate,
    num_negatives_for,
)

GOLDEN = golden_files.read_json("coupon.json")
EPS = torch.finfo(torch.float64).eps
LONG_TAIL = (1 / torch.arange(1, 301, dtype=torch.float64)).tolist()


def test_uniform_coverage_is_the_recorded_exact_value():
    for case in GOLDEN["coverage_uniform"]:
        got = float(coverage_probability(case["n"], num_classes=case["C"]))
        assert got == pytest.approx(case["exact"], rel=1e-12, abs=0), case


def test_coverage_collisions_and_draws_of_any_prior_are_the_recorded_exact_values():
    for case in GOLDEN["coverage_nonuniform"]:
        counts, n = case["counts"], case["n"]
        assert float(coverage_probability(n, prior=counts)) == pytest.approx(case["exact"], rel=1e-12, abs=0), case
        assert float(collision_probability(n - 1, counts)) == pytest.approx(case["tau_K"], rel=1e-12), case
        assert float(expected_log_collisions(n - 1, counts)) == pytest.approx(case["e_log_col"], rel=1e-12), case
        assert expected_draws(prior=counts) == pytest.approx(case["expected_draws"], rel=1e-12), case


def test_uniform_collisions_and_draws_are_the_recorded_values():
    for case in GOLDEN["expected_draws_uniform"]:
        assert expected_draws(num_classes=case["C"]) == pytest.approx(case["expected_draws"], rel=1e-12), case
    for case in GOLDEN["collision_uniform"]:
        classes = torch.ones(case["C"])
        assert float(collision_probability(case["K"], classes)) == pytest.approx(case["tau_K"], rel=1e-12), case
        # recorded through ln Gamma, whose rounding is an ulp of K ln K
        rel = 4 * EPS * case["K"] * math.log(case["K"])
        assert float(expected_log_collisions(case["K"], classes)) == pytest.approx(case["e_log_col"], rel=rel), case


@pytest.mark.parametrize("counts", [[1], [3, 1], [1, 1, 1], [50, 3, 2, 1], [1, 1, 2, 3, 5], [10**6, 1000, 1]])
def test_coverage_is_inclusion_and_exclusion_in_rational_numbers(counts):
    total = sum(counts)
    for n in (0, 1, len(counts) - 1, len(counts), 7, 15, 16, 40):
        exact = sum(
            (-1) ** size * sum(Fraction(total - sum(left_out), total) ** n for left_out in _subsets(counts, size))
            for size in range(len(counts) + 1)
        )
        got = float(coverage_probability(n, prior=counts))
        assert got == pytest.approx(float(exact), rel=1e-12, abs=0), n


def _subsets(counts, size):
    return itertools.combinations(counts, size)


@pytest.mark.parametrize(("num_classes", "n"), [(3, 3), (10, 40), (100, 512), (1000, 16384)])
def test_uniform_coverage_is_that_of_the_occupancy_chain(num_classes, n):
    seen = np.zeros(num_classes + 1)  # probability of k different classes so far
    seen[0] = 1.0
    stay = np.arange(num_classes + 1) / num_classes
    for _ in range(n):
        seen[1:] = seen[1:] * stay[1:] + seen[:-1] * (1 - stay[:-1])
        seen[0] = 0.0
    # two products and a sum per draw, each rounded
    assert float(coverage_probability(n, num_classes=num_classes)) == pytest.approx(seen[-1], rel=3 * n * EPS, abs=0)


@pytest.mark.parametrize("n", [300, 1500, 4096])
def test_long_tailed_coverage_is_that_of_the_class_by_class_programme(n):
    prior = np.array(LONG_TAIL) / sum(LONG_TAIL)
    covered = np.ones(1)  # probability that k draws, Poisson with mean n, fell into the classes so far and covered them
    for rate in prior * n:
        k = np.arange(1, min(n, int(rate + 20 * math.sqrt(rate) + 60)) + 1)
        at_least_one = math.exp(-rate) * np.cumprod(rate / k)
        covered = np.concatenate([[0.0], np.convolve(covered, at_least_one)])[: n + 1]
    # Poisson(n; n) by Stirling's series, the first term left out is below 1e-13 here
    exactly_n = math.exp(-1 / (12 * n) + 1 / (360 * n**3)) / math.sqrt(2 * math.pi * n)
    got = float(coverage_probability(n, prior=LONG_TAIL))
    assert got == pytest.approx(covered[n] / exactly_n, rel=2 * n * EPS, abs=0)


def test_equal_weights_are_grouped_without_changing_the_result():
    draws = [4, 10, 100]
    equal = coverage_probability(draws, num_classes=4)
    nearly = coverage_probability(draws, prior=[1, 1 + 1e-14, 1 - 1e-14, 1 + 2e-14])
    assert torch.allclose(coverage_probability(draws, prior=[7, 7, 7, 7]), equal, rtol=1e-14, atol=0)
    assert torch.allclose(nearly, equal, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 2, 31, 511])
def test_log_collisions_are_the_sum_over_the_binomial(k):
    counts = [5, 3, 1, 1]
    expected = math.fsum(
        float(Fraction(c, 10) * math.comb(k, j) * Fraction(c, 10) ** j * Fraction(10 - c, 10) ** (k - j))
        * math.log(j + 1)
        for c in counts
        for j in range(k + 1)
    )
    assert float(expected_log_collisions(k, counts)) == pytest.approx(expected, rel=1e-13)


def test_simulated_draws_agree():
    trials, n, prior = 40_000, 24, torch.tensor([6.0, 3.0, 2.0, 1.0])
    draws = torch.multinomial(prior.expand(trials, -1), n, replacement=True, generator=torch.Generator().manual_seed(0))
    covered = torch.stack([(draws == c).any(1) for c in range(4)]).all(0).double()
    collisions = (draws[:, 1:] == draws[:, :1]).sum(1)
    for samples, expected in (
        (covered, coverage_probability(n, prior=prior)),
        ((collisions > 0).double(), collision_probability(n - 1, prior)),
        (collisions.double().log1p(), expected_log_collisions(n - 1, prior)),
        ((draws[:, 1] == draws[:, 0]).double(), false_negative_rate(prior)),
    ):
        standard_error = float(samples.std()) / math.sqrt(trials)
        assert float(samples.mean()) == pytest.approx(float(expected), abs=5 * standard_error)


def test_simulated_waiting_time_agrees():
    trials, n, prior = 20_000, 600, torch.tensor([6.0, 3.0, 2.0, 1.0])
    draws = torch.multinomial(prior.expand(trials, -1), n, replacement=True, generator=torch.Generator().manual_seed(1))
    first = torch.stack([(draws == c).int().argmax(1) for c in range(4)])
    waited = first.amax(0).double() + 1
    standard_error = float(waited.std()) / math.sqrt(trials)
    assert float(waited.mean()) == pytest.approx(expected_draws(prior=prior), abs=5 * standard_error)


def test_everything_grows_with_the_number_of_draws():
    n = torch.arange(0, 400)
    for prior in ([1.0] * 20, LONG_TAIL[:20]):
        coverage = coverage_probability(n, prior=prior)
        assert bool((coverage.diff() >= -1e-13).all()) and bool((coverage[:20] == 0).all()) and coverage[-1] > 0.9
        for values in (collision_probability(n, prior), expected_log_collisions(n, prior)):
            assert values[0] == 0 and bool((values.diff() > -1e-13).all())


def test_shape_of_the_draws_is_kept():
    assert coverage_probability(5, num_classes=2).shape == ()
    draws = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for values in (
        coverage_probability(draws, num_classes=2),
        collision_probability(draws, [1, 2]),
        expected_log_collisions(draws, [1, 2]),
    ):
        assert values.shape == (2, 3) and values.dtype == torch.float64
    assert coverage_probability(draws, num_classes=2)[1, 0] == coverage_probability(8, num_classes=2)


@pytest.mark.parametrize("coverage", [1e-6, 0.5, 0.9, 0.999999, 1 - 1e-12])
@pytest.mark.parametrize("classes", [{"num_classes": 10}, {"num_classes": 2}, {"prior": LONG_TAIL[:50]}])
def test_number_of_negatives_is_the_smallest_that_reaches_the_coverage(coverage, classes):
    negatives = num_negatives_for(coverage, **classes)
    assert coverage_probability(negatives + 1, **classes) >= coverage
    assert coverage_probability(negatives, **classes) < coverage


def test_published_numbers_of_draws():
    assert math.ceil(expected_draws(num_classes=10)) == 30  # CIFAR-10
    assert math.ceil(expected_draws(num_classes=100)) == 519  # CIFAR-100
    assert math.ceil(expected_draws(num_classes=1000)) == 7486  # ImageNet, balanced
    million = 1e6 * (math.log(1e6) + 0.5772156649015329 + 0.5e-6)  # C H_C
    assert expected_draws(num_classes=1_000_000) == pytest.approx(million, rel=1e-12)


def test_one_class_is_covered_at_once():
    assert coverage_probability([0, 1, 2, 100], num_classes=1).tolist() == pytest.approx([0, 1, 1, 1], abs=1e-14)
    assert expected_draws(num_classes=1) == pytest.approx(1, rel=1e-13)
    assert num_negatives_for(0.5, num_classes=1) == 0
    assert false_negative_rate([5.0]) == 1
    assert collision_probability([0, 1, 9], [5.0]).tolist() == [0, 1, 1]
    assert expected_log_collisions(9, [5.0]) == pytest.approx(math.log(10), rel=1e-13)


def test_class_of_weight_zero_is_never_covered():
    prior = [0.5, 0.0, 0.5]
    assert coverage_probability([2, 3, 10**6], prior=prior).tolist() == [0, 0, 0]
    assert expected_draws(prior=prior) == math.inf
    with pytest.raises(ValueError, match="weight 0"):
        num_negatives_for(0.5, prior=prior)
    assert false_negative_rate(prior) == false_negative_rate([1, 1]) == 0.5
    assert collision_probability(3, prior) == collision_probability(3, [1, 1])
    assert float(expected_log_collisions(3, prior)) == pytest.approx(float(expected_log_collisions(3, [1, 1])))


def test_weights_need_not_sum_to_one():
    counts = torch.tensor([30, 20, 10])
    for scale in (1.0, 1e-30, 1e30):
        assert coverage_probability(9, prior=counts * scale) == pytest.approx(
            float(coverage_probability(9, prior=[3, 2, 1])), rel=1e-13
        )


def test_rare_class_decides():
    prior = [0.5, 0.5 - 1e-6, 1e-6]
    assert float(coverage_probability(1000, prior=prior)) == pytest.approx(-math.expm1(1000 * math.log1p(-1e-6)))
    assert expected_draws(prior=prior) == pytest.approx(1e6, rel=1e-5)


@pytest.mark.parametrize(
    "prior", [[0.5, float("nan")], [0.5, -0.1], [math.inf, 1.0], [0.0, 0.0], [], [[0.5, 0.5]], 0.5]
)
def test_bad_prior_is_refused(prior):
    for function in (
        lambda: coverage_probability(3, prior=prior),
        lambda: expected_draws(prior=prior),
        lambda: collision_probability(3, prior),
        lambda: expected_log_collisions(3, prior),
        lambda: false_negative_rate(prior),
        lambda: num_negatives_for(0.5, prior=prior),
    ):
        with pytest.raises(ValueError, match="prior"):
            function()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="one of the two"):
        coverage_probability(3)
    with pytest.raises(ValueError, match="one of the two"):
        expected_draws(num_classes=2, prior=[1, 1])
    for num_classes in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_classes"):
            coverage_probability(3, num_classes=num_classes)
    for draws in (2.5, [1.0, 2.0], True):
        with pytest.raises(TypeError, match="integers"):
            coverage_probability(draws, num_classes=2)
    with pytest.raises(ValueError, match=">= 0"):
        collision_probability([3, -1], [1, 1])
    for coverage in (0, 1, -0.5, float("nan"), 1 - 1e-14):
        with pytest.raises(ValueError, match="coverage"):
            num_negatives_for(coverage, num_classes=2)


@pytest.mark.parametrize("n", [10**4, 10**9, 10**14, 10**18, 2**63 - 1])
@pytest.mark.parametrize("expected", [1e-3, 1.0, 8.0])
def test_coverage_of_any_number_of_draws_costs_the_same_and_keeps_its_digits(n, expected):
    """Two classes, the rarer one drawn `expected` times on average."""
    share = expected / n
    exact = -math.expm1(n * math.log1p(-share))  # the other class is never missing
    got = float(coverage_probability(n, prior=[share, 1 - share]))
    assert got == pytest.approx(exact, rel=1e-12, abs=0)
    if exact < 0.99:  # beyond it rounding moves the number of draws
        assert num_negatives_for(exact, prior=[share, 1 - share]) == pytest.approx(n - 1, rel=1e-11, abs=1)


def test_very_many_draws_show_very_many_classes():
    assert float(coverage_probability(10**18, num_classes=10**6)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("factor", [1e308, 1e-320, 5e-324])
def test_weights_count_by_their_ratio_alone(factor):
    assert float(coverage_probability(3, prior=[factor, factor])) == pytest.approx(0.75, rel=1e-13)
    assert false_negative_rate([factor, factor]) == 0.5
    assert float(collision_probability(1, [factor, factor])) == 0.5
    assert expected_draws(prior=[factor, factor]) == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize("share", [1e-17, 1e-150, 1e-299])
def test_very_rare_classes_are_counted(share):
    exact = math.log(2) / share
    assert expected_draws(prior=[share, 1.0]) == pytest.approx(1 / share, rel=1e-12)
    assert num_negatives_for(0.5, prior=[share, 1.0]) == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("prior", [[1e-320, 1.0], [1e-301, 1.0], [1e308, 1e-5]])
def test_classes_too_rare_for_float64_are_refused(prior):
    for call in (false_negative_rate, lambda p: coverage_probability(2, prior=p), lambda p: expected_draws(prior=p)):
        with pytest.raises(ValueError, match=r"at least 1e-300 of the sum.*Leave such classes out"):
            call(prior)


def test_draws_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match="num_draws must be integers below 2\\^63"):
        coverage_probability(2**63, num_classes=2)
