"""How a negative's rank among all negatives of its anchor becomes an importance weight (BCL, arXiv:2301.11673).

    u     = rank / N, the share of the anchor's negatives whose logit is not larger; equal logits share the largest rank
    Phi   = root of a Phi^2 + b Phi = u,  a = (1 - 2 alpha)(1 - 2 tau) + eps,  b = 2 (alpha (1 - tau) + (1 - alpha) tau)
    omega = [2 alpha (1 - beta)(1 - Phi) + 2 (1 - alpha) beta Phi]
            / (alpha (1 - beta) + (1 - alpha) beta + eps) / [b (1 - Phi) + (2 - b) Phi]

a + b = 1 + eps, so that with v = 1 - u and c = 2 - b the root and its complement need no difference of near-equal
numbers: neither where a vanishes (alpha = .5) nor at the highest rank, where 1 - Phi is all that beta = 0 leaves.

    r = sqrt((2v - c)^2 + 4u (v + eps)),   Phi = 2u / (b + r),   1 - Phi = 2 (v + eps) / (c + 2 eps + r)

Ranks are constants of the gradient, and so are the weights. They come exactly, from the sorted row, or from a histogram
over the row's range:

    u = (below + frac (count - 1) + 1) / N        below: negatives in lower bins, count: in this bin, frac: place in it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number

Ranks = Literal["auto", "exact", "histogram"]
RANKS = ("auto", "exact", "histogram")
# Up to so many candidates `auto` sorts: no approximation while the loss is a small part of a training step.
# Depends on the problem alone, so that a run gives the same numbers on every machine.
AUTO_EXACT_CANDIDATES = 32768
AXIS_SLACK = 16  # ulps of its row's largest logit by which a logit may come out differently where it is made again


def choose_ranks(ranks: str, candidates: int) -> Literal["exact", "histogram"]:
    """What `ranks` means for anchors with so many candidates: "auto" is exact up to AUTO_EXACT_CANDIDATES."""
    if ranks == "auto":
        return "exact" if candidates <= AUTO_EXACT_CANDIDATES else "histogram"
    return ranks  # type: ignore[return-value]


@dataclass(frozen=True)
class Ranking:
    """The weight of a negative as a function of its rank, and how ranks are found: bins = 0 exactly.

    tau_plus  one, or constants [N] of the rows
    """

    tau_plus: float | Tensor
    alpha: float
    beta: float
    eps: float
    bins: int

    def of_rows(self, rows: slice) -> Ranking:
        """The same for some of the rows."""
        return replace(self, tau_plus=self.tau_plus[rows]) if isinstance(self.tau_plus, Tensor) else self

    @property
    def coefficients(self) -> tuple[Any, Any, float, float, float]:
        """(b, c, eps, low, high): omega = [low (1 - Phi) + high Phi] / [b (1 - Phi) + c Phi]; b, c [N, 1] of priors."""
        alpha, beta = self.alpha, self.beta
        tau = self.tau_plus[:, None] if isinstance(self.tau_plus, Tensor) else self.tau_plus
        norm = alpha * (1 - beta) + (1 - alpha) * beta + self.eps
        return (
            2 * (alpha * (1 - tau) + (1 - alpha) * tau),
            2 * ((1 - alpha) * (1 - tau) + alpha * tau),
            self.eps,
            2 * alpha * (1 - beta) / norm,
            2 * (1 - alpha) * beta / norm,
        )

    def weight(self, u: Tensor, v: Tensor) -> Tensor:
        """omega(u) [N, M] for u in [0, 1] and v = 1 - u, of ranks the share that is larger."""
        b, c, eps, low, high = self.coefficients
        root = ((2 * v - c).square() + 4 * u * (v + eps)).sqrt()
        phi, rest = 2 * u / (b + root), 2 * (v + eps) / (c + 2 * eps + root)
        return (low * rest + high * phi) / (b * rest + c * phi)

    def weight_of_rank(self, rank: Tensor, count: Tensor) -> Tensor:
        """omega of ranks from 1 to `count`."""
        return self.weight(rank / count, (count - rank) / count)


def check_ranking(tau_plus: float | Tensor, alpha: float, beta: float, eps: float, ranks: str, bins: int) -> None:
    """TypeError for parameters that are no numbers, ValueError outside their range; the prior's own range aside."""
    for name, value in (("alpha", alpha), ("beta", beta), ("eps", eps)):
        check_number(name, value)
    if not 0.5 <= alpha <= 1:
        raise ValueError(
            "alpha, how often the encoder ranks a positive above a negative (its macro-AUC), must be in [0.5, 1]; "
            f"got {alpha}."
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta, the concentration on hard negatives, must be in [0, 1]; got {beta}.")
    if alpha == 1 and beta == 1:
        raise ValueError("alpha = beta = 1 gives every negative weight 0; lower one of them.")
    if not 0 <= eps <= 1:
        raise ValueError(f"eps, a small number that denominators are kept from 0 with, must be in [0, 1]; got {eps}.")
    if alpha == 1 and eps == 0 and (isinstance(tau_plus, Tensor) or tau_plus == 0):
        raise ValueError("alpha = 1 with tau_plus = 0 divides by zero at the highest rank; give eps > 0.")
    if ranks not in RANKS:
        raise ValueError(f"ranks must be one of {', '.join(RANKS)}; got {ranks!r}.")
    if not isinstance(bins, int) or not 2 <= bins <= 65536:
        raise ValueError(f"bins must be an integer from 2 to 65536; got {bins!r}.")


class RankedStatistics(NamedTuple):
    """What the ranked forward returns.

    lse    [N]        log of the sum over the row's negatives of omega e^s; -inf for a row without any
    aux    [1, N]     count of negatives; with diagnostics [6, N]: count, largest logit, sum of logits, log of the sum
                      of (omega e^s)^2, sum and maximum of the weights
    axis   [3, N]     histogram only: lowest logit, bins per unit of logit, count
    below  [N, K + 1] histogram only: negatives in lower bins
    """

    lse: Tensor
    aux: Tensor
    axis: Tensor
    below: Tensor


def histogram_axis(lowest: Tensor, highest: Tensor, count: Tensor, bins: int) -> Tensor:
    """[3, N] axis of histograms over [lowest, highest].

    It ends AXIS_SLACK below the highest logit, which so lies at the upper end of its last bin, u = 1, however it is
    rounded when it is computed again: with beta = 0 and eps = 0 its weight is 0 and nothing else. Rows of equal logits
    put all of them there, as the largest rank would. A row whose range is not a number gets any axis, its logits make
    the loss what it has to be.
    """
    slack = AXIS_SLACK * torch.finfo(highest.dtype).eps
    largest = torch.maximum(lowest.abs(), highest.abs())
    flat = ~(highest - lowest > slack * largest) | ~(largest < torch.inf)
    lowest = torch.where(flat, highest - 1 - largest, lowest)
    per_logit = bins / (highest - slack * torch.where(flat, 1 + largest, largest) - lowest)
    return torch.stack([lowest, per_logit, count.clamp(min=1)])
