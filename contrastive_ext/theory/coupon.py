"""How many negatives are enough: a batch as the draws of a coupon collector, whose coupons are the classes.

An anchor and its K negatives are n = K + 1 draws from classes of probability pi_c. Coverage is the probability that
every class is among them; a collision is a negative of the anchor's own class (Nozawa & Sato, NeurIPS 2021,
arXiv:2102.06866).

Coverage is n! [z^n] prod_c (e^{pi_c z} - 1). Written by inclusion and exclusion it alternates and loses every digit at
100 classes (4.5e-4 instead of 1.5e-22). Here it is a product of positive factors: for any r > 0, lambda_c = pi_c r,

    coverage = prod_c (1 - e^{-lambda_c}) * P(S = n) / Poisson(n; r)

where S is a sum of independent Poisson(lambda_c) variables, each conditioned to be positive. P(S = n) is a Fourier sum;
r is chosen so that n is in the middle of S (the saddle point), where that sum has no cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 32  # points of a sum at a time, times the different probabilities; of the Fourier sum about 20 count
_SMALLEST_STEP = 2**-12
_TOLERANCE = 1e-13  # between two steps of the quadrature, whose error at the second is about the square
_NEGLIGIBLE = 42.0  # e^-42 is far below an ulp
_SMALLEST_SHARE = 1e-300  # of a class among the draws; its inverse, times a few, must be finite
_LARGEST_COVERAGE = 1 - 1e-12  # closer to 1 rounding decides


class _Prior(NamedTuple):
    """Distinct probabilities [U] float64, ascending, and how many classes have each."""

    probability: Tensor
    multiplicity: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.multiplicity.sum())

    @property
    def has_impossible_class(self) -> bool:
        return bool(self.probability[0] == 0)

    def sum(self, per_class: Tensor) -> Tensor:
        """Sum over the classes of [..., U] values."""
        return per_class @ self.multiplicity


def coverage_probability(
    num_draws: int | Sequence[int] | Tensor,
    *,
    num_classes: int | None = None,
    prior: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Probability that `num_draws` independent draws show every class; n = K + 1 draws for K negatives.

    num_draws    integers >= 0 of any shape: samples, the anchor's own included
    num_classes  C >= 1 classes of equal probability, or
    prior        [C] non-negative weights, for instance class counts; divided by their sum
    Returns      float64 tensor of the shape of num_draws, to a relative error of about 1e-13. A class of weight 0 is
                 never drawn: 0
    Raises       ValueError on weights that are negative, not finite, all 0, or positive below 1e-300 of their sum, on
                 draws outside 0 to 2^63 - 1, and unless exactly one of num_classes and prior is given; TypeError on
                 draws that are not integers
    Cost         O(U) for U different probabilities, whatever n is
    Paper        Nozawa & Sato, NeurIPS 2021, arXiv:2102.06866
    """
    classes = _classes(num_classes, prior)
    draws = _integers(num_draws, "num_draws")
    values = [_coverage(n, classes) for n in draws.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(draws.shape)


def expected_draws(*, num_classes: int | None = None, prior: Sequence[float] | Tensor | None = None) -> float:
    """Mean number of draws until every class was seen: C (1 + 1/2 + ... + 1/C) for C equal classes.

    num_classes, prior   as in `coverage_probability`; a class of weight 0 makes it inf
    Formula              integral over s >= 0 of 1 - prod_c (1 - e^{-pi_c s})
    """
    classes = _classes(num_classes, prior)
    if classes.has_impossible_class:
        return math.inf

    def missing(s: Tensor) -> Tensor:  # probability that a class is missing when draws arrive as a Poisson process
        return -torch.expm1(classes.sum(_log_seen(classes.probability * s[:, None])))

    end = math.log((_NEGLIGIBLE + math.log(classes.num_classes)) / float(classes.probability[0]))
    return _integral_over_log(lambda s: missing(s) * s, -_NEGLIGIBLE, end)


def collision_probability(num_negatives: int | Sequence[int] | Tensor, prior: Sequence[float] | Tensor) -> Tensor:
    """tau_K, the probability that at least one of K negatives is of the anchor's class: 1 - sum_c pi_c (1 - pi_c)^K.

    num_negatives  K, integers >= 0 of any shape
    prior          [C] non-negative weights, divided by their sum; torch.ones(C) for equal classes
    Returns        float64 tensor of the shape of num_negatives
    """
    classes = _classes(None, prior)
    negatives = _integers(num_negatives, "num_negatives")
    log_no_collision = torch.special.xlog1py(negatives.double()[..., None], -classes.probability)
    return classes.sum(-classes.probability * torch.expm1(log_no_collision))


def expected_log_collisions(num_negatives: int | Sequence[int] | Tensor, prior: Sequence[float] | Tensor) -> Tensor:
    """E ln(Col + 1), the collision term of the bounds in nats: Col of K negatives are of the anchor's class.

    num_negatives, prior   as in `collision_probability`
    Formula                sum_c pi_c E ln(Binomial(K, pi_c) + 1), and because ln(m) = int (e^-t - e^-mt)/t dt, that is
                           int_0^inf e^-t/t sum_c pi_c [1 - (1 - pi_c (1 - e^-t))^K] dt, whose cost K does not raise
    Returns                float64 tensor of the shape of num_negatives
    """
    classes = _classes(None, prior)
    negatives = _integers(num_negatives, "num_negatives")

    def of(k: int) -> float:
        def integrand(t: Tensor) -> Tensor:
            no_collision = torch.special.xlog1py(float(k), classes.probability * torch.expm1(-t)[:, None])
            return torch.exp(-t) * classes.sum(-classes.probability * torch.expm1(no_collision))

        return _integral_over_log(integrand, -_NEGLIGIBLE - math.log(k), math.log(2 * _NEGLIGIBLE)) if k else 0.0

    values = [of(k) for k in negatives.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(negatives.shape)


def false_negative_rate(prior: Sequence[float] | Tensor) -> float:
    """Probability that a random negative is of the anchor's class, sum_c pi_c^2: the natural `tau_plus`.

    prior   [C] non-negative weights, divided by their sum; for C equal classes the rate is 1/C
    """
    classes = _classes(None, prior)
    return float(classes.sum(classes.probability.square()))


def num_negatives_for(
    coverage: float, *, num_classes: int | None = None, prior: Sequence[float] | Tensor | None = None
) -> int:
    """Smallest number of negatives K for which anchor and negatives show every class with probability `coverage`.

    Beyond 2^53 to the precision of float64.

    coverage             in (0, 1 - 1e-12]
    num_classes, prior   as in `coverage_probability`
    Raises               ValueError also if a class has weight 0: no number of negatives covers it
    """
    classes = _classes(num_classes, prior)
    if not 0 < coverage <= _LARGEST_COVERAGE:
        raise ValueError(f"coverage must be in (0, 1 - 1e-12]; got {coverage}.")
    if classes.has_impossible_class:
        raise ValueError("prior has a class of weight 0, which no number of negatives covers; leave such classes out.")

    def is_enough(draws: int) -> bool:
        return _coverage(draws, classes) >= coverage

    # draws that arrive as a Poisson process make the classes independent: a guess that is a few draws off
    def arrivals_are_enough(s: float) -> bool:
        return float(classes.sum(_log_seen(classes.probability * s))) >= math.log(coverage)

    low, high = 0.0, 1.0
    while not arrivals_are_enough(high):
        low, high = high, 2 * high
    while high - low > max(0.5, math.ulp(high)):
        middle = (low + high) / 2
        low, high = (low, middle) if arrivals_are_enough(middle) else (middle, high)
    guess = max(classes.num_classes, round(high))

    one = max(1, int(math.ulp(float(guess))))  # draws are told apart to the precision of float64
    step, enough, too_few = one, guess, guess
    while not is_enough(enough):
        too_few, enough, step = enough, enough + step, 2 * step
    if enough == guess:
        while is_enough(too_few):
            enough, too_few, step = too_few, too_few - step, 2 * step
    while enough - too_few > one:
        half = (enough + too_few) // 2
        enough, too_few = (half, too_few) if is_enough(half) else (enough, half)
    return enough - 1


def _coverage(n: int, classes: _Prior) -> float:
    if n < classes.num_classes or classes.has_impossible_class:
        return 0.0
    r = _saddle_point(n, classes)
    rates = classes.probability * r
    log_positive = float(classes.sum(_log_seen(rates)))
    # Poisson(n; r) = e^{-deviation - stirling error}/sqrt(2 pi n): n!, n^n and e^n never appear
    u = (r - n) / n
    deviation = n * (u - (math.log1p(u) if u > -0.5 else math.log(r / n)))
    log_ratio = log_positive + deviation + _stirling_error(n) + 0.5 * math.log(2 * math.pi * n)
    return min(1.0, math.exp(log_ratio) * _probability_of_sum(n, r, rates, log_positive, classes))


def _saddle_point(n: int, classes: _Prior) -> float:
    """The r for which S has mean n + 1/2; the half keeps r > 0 at n = C, where S cannot be smaller."""
    low, high = n + 0.5 - classes.num_classes, n + 0.5
    for _ in range(40):  # any r gives the right value, this one the full precision
        r = (low + high) / 2
        rates = classes.probability * r
        low, high = (low, r) if float(classes.sum(rates / -torch.expm1(-rates))) > n + 0.5 else (r, high)
    return (low + high) / 2


def _probability_of_sum(n: int, r: float, rates: Tensor, log_positive: float, classes: _Prior) -> float:
    """P(S = n) = 1/M sum_k phi(2 pi k/M) e^{-2 pi i k n/M}, which also counts S = n + M, n + 2 M, ..."""
    mean = rates / -torch.expm1(-rates)
    variance = float(classes.sum(mean * (1 - rates / torch.expm1(rates))))  # 1 + rates - mean, at any rate
    # Bennett: P(S >= n + x) <= e^{-v h(x/v)}, v = min(2 variance, r), h(u) = (1 + u) ln(1 + u) - u; below n Gaussian.
    # x = M is beyond e^-50.
    half = math.ceil(20 + 5 * math.sqrt(min(2 * variance, r)))
    num_points = 2 * half + 1
    # |phi| falls on [0, pi/2], because sin(theta + x) <= sin theta + x cos theta there, and is below e^log_beyond after
    # it, because |e^z - 1| <= min(|z|, 2) for Re z <= 0. So the sum may end with a block that ends below e^-50.
    log_beyond = float(classes.sum(torch.log(rates.clamp(max=2.0) / torch.expm1(rates.clamp(max=700.0)))))
    total = 0.0
    for begin in range(0, half + 1, _BLOCK):
        k = torch.arange(begin, min(begin + _BLOCK, half + 1), dtype=torch.float64)
        theta = 2 * math.pi / num_points * k
        # phi_c = e^{lambda (w - 1)} (1 - e^{-lambda w})/(1 - e^{-lambda}), w = e^{i theta}. The first factors are
        # e^{r (w - 1)} together. Where the clamp acts, phi_c is below e^-300.
        x = (-theta.cos()[:, None] * rates).clamp_(max=300.0)
        y = -theta.sin()[:, None] * rates
        # 1 - e^{-lambda w} = 1 - e^{x + iy}
        e, sine_squared = x.exp(), torch.sin(y / 2).square()
        real, imaginary = 2 * e * sine_squared - torch.expm1(x), -e * y.sin()
        size = _log(torch.hypot(real, imaginary), e * (e - 2 + 4 * sine_squared), power=2)
        log_size = classes.sum(size) - log_positive - 2 * r * torch.sin(theta / 2).square()
        # r sin(theta) - n theta, of which only the difference is small
        angle = classes.sum(torch.atan2(imaginary, real)) + r * _sin_excess(theta) + (r - n) * theta
        terms = log_size.exp() * angle.cos()
        total += float(terms.sum()) * 2 - (float(terms[0]) if k[0] == 0 else 0.0)  # phi(-theta) is the conjugate
        if theta[-1] <= math.pi / 2 and max(float(log_size[-1]), log_beyond) < -50:
            break
    return total / num_points


def _sin_excess(x: Tensor) -> Tensor:
    """sin x - x, also where both are nearly the same."""
    square = x * x
    series = (
        -x
        * square
        / 6
        * (1 - square / 20 * (1 - square / 42 * (1 - square / 72 * (1 - square / 110 * (1 - square / 156)))))
    )
    return torch.where(x < 0.5, series, x.sin() - x)


def _log(q: Tensor, excess: Tensor, power: int = 1) -> Tensor:
    """log q for q^power = 1 + excess, from whichever of the two has the digits: thousands of classes have q near 1."""
    return torch.where(excess.abs() < 0.5, torch.log1p(excess) / power, q.log())


def _log_seen(rate: Tensor) -> Tensor:
    """log(1 - e^-rate), that a class of this Poisson rate was seen."""
    return _log(-torch.expm1(-rate), -torch.exp(-rate))


def _stirling_error(n: int) -> float:
    """ln n! - ln(sqrt(2 pi n) n^n e^-n)."""
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    square = float(n) ** 2 if n < 1e150 else math.inf
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / (1188 * square)) / square) / square) / square) / n


def _integral_over_log(f: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Integral of f(e^u) over u in [low, high] by the trapezoidal rule, halving the step until it has converged.

    f must vanish at both ends: then the error falls exponentially in 1/step.
    """

    def sum_over(u: Tensor) -> float:
        return sum(float(f(part.exp()).sum()) for part in u.split(_BLOCK))

    step = 0.25
    points = low + step * torch.arange(math.ceil((high - low) / step) + 1, dtype=torch.float64)
    value = step * sum_over(points)
    while step > _SMALLEST_STEP:
        previous, step = value, step / 2
        points = points + step
        value = previous / 2 + step * sum_over(points)
        if abs(value - previous) <= _TOLERANCE * abs(value):
            return value
        points = torch.cat([points - step, points])
    raise ArithmeticError(f"the quadrature did not converge, its last values were {previous} and {value}.")


def _classes(num_classes: int | None, prior: Sequence[float] | Tensor | None) -> _Prior:
    if (num_classes is None) == (prior is None):
        raise ValueError(
            "expected num_classes or prior, one of the two; got " + ("both." if prior is not None else "none.")
        )
    if prior is None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1; got {num_classes!r}.")
        one = torch.ones(1, dtype=torch.float64)
        return _Prior(one / num_classes, one * num_classes)
    weights = torch.as_tensor(prior, dtype=torch.float64, device="cpu").detach()
    if weights.dim() != 1 or len(weights) == 0:
        raise ValueError(f"prior must be a vector [C] of at least one class; got shape {list(weights.shape)}.")
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or float(weights.sum()) == 0:
        raise ValueError(f"prior must be finite, non-negative and not all 0; got {weights.tolist()[:8]} ...")
    share = weights / weights.max()  # the sum of the weights themselves may overflow
    share /= share.sum()
    if bool(((weights > 0) & (share < _SMALLEST_SHARE)).any()):
        raise ValueError(
            f"a class of prior must have at least {_SMALLEST_SHARE:g} of the sum, or none of it; got weights from "
            f"{float(weights[weights > 0].min())} to {float(weights.max())}. Leave such classes out."
        )
    distinct, multiplicity = share.unique(sorted=True, return_counts=True)
    return _Prior(distinct, multiplicity.double())


def _integers(values: int | Sequence[int] | Tensor, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be integers below 2^63, in a rectangular array; got {values!r:.60}.") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {tensor.dtype}.")
    if bool((tensor < 0).any()):
        raise ValueError(f"{name} must be >= 0; got {int(tensor.min())}.")
    return tensor.long()
