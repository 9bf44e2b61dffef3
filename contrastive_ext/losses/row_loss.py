"""What a loss over pairs is: a formula over the statistics of one row, and facts about it. It computes nothing else.

Autograd through these length-R vectors yields the coefficients dL/dlse_k and dL/dpos; the operators turn them into the
gradients of z1, z2 and the temperature. A row loss therefore runs on every backend the day it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..batch.distributed import check_gathers
from ..batch.request import Request
from ..problem.problem import Formula
from ..problem.ranking import Ranking
from .dense import DenseLogits


@dataclass(frozen=True)
class RowStatistics:
    """What a row loss sees: vectors of length R, one entry per anchor, in float32 (float64 for float64 inputs).

    lse         log sum over the negatives of exp(beta_k s_ij), one vector per entry of the loss's `exponents`
    pos         logit of the positive, <anchor, positive> * scale
    correction  log-mean-exp of the logits of the debiasing positives; pos unless `positives` was given
    count       number of negatives
    scale       1/temperature, a float, a 0-d tensor or [R]
    positive_terms  how often e^pos stands in a row's denominator: twice where a layout sums "q2d" and "d2q"
    """

    lse: tuple[Tensor, ...]
    pos: Tensor
    correction: Tensor
    count: Tensor
    scale: float | Tensor
    positive_terms: int = 1

    def without_empty(self, empty: Tensor) -> RowStatistics:
        """Finite stand-ins for rows without negatives, so that a formula and its derivative stay finite there."""
        return replace(
            self,
            lse=tuple(x.masked_fill(empty, 0.0) for x in self.lse),
            pos=self.pos.masked_fill(empty, 0.0),
            correction=self.correction.masked_fill(empty, 0.0),
            count=self.count.masked_fill(empty, 1.0),
        )


class RowLoss:
    """A contrastive loss as a formula of row statistics. Subclass with a frozen dataclass and write `from_stats`."""

    exponents: tuple[float, ...] = (1.0,)  # the beta_k > 0, one or two, whose log-sum-exps the loss needs
    default_temperature: float = 0.5
    formula: Formula | None = None  # the fused spelling of `from_stats` (csrc/row_losses.h), for the short road
    # for a loss that weighs negatives by rank: how, where every anchor has so many candidates
    ranking: Callable[[int], Ranking] | None = None
    takes_directions: bool = False  # whether it is defined for layouts that are tuples of directions

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "from_stats" in cls.__dict__ and "formula" not in cls.__dict__:
            cls.formula = None  # an inherited one is of another loss

    def check(self, request: Request) -> None:
        """ValueError or TypeError where the loss does not fit a checked request; called before anything is computed."""
        if isinstance(request.layout, tuple) and not self.takes_directions:
            raise ValueError(
                f"{type(self).__name__} is not defined for layout={request.layout!r}, which sums several directions: "
                "use 'one_way', 'symmetric' or 'two_view'."
            )
        if self.ranking is not None and self.ranking(1).bins == 0:
            reason = "exact ranks are among the columns of all ranks; by histograms, ranks='histogram', they go round."
            check_gathers(request.group, reason)

    def of_rows(self, rows: slice, total: int) -> RowLoss:
        """The loss of some of `total` rows, for one that has a parameter of each."""
        return self

    def hardness_of(self, own: bool) -> float:
        """What is added, times the constant cosine, to the logits of an anchor's own or of all other candidates."""
        return 0.0

    def without_negatives(self, positive_terms: int) -> float:
        """The loss of a row without negatives."""
        return 0.0

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row, in nats, differentiable in stats.lse, pos, correction and scale."""
        raise NotImplementedError(f"{type(self).__name__} must define from_stats(self, stats).")

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] the same loss from the whole matrix, for backend="reference"; by default through `from_stats`."""
        lse = tuple(logits.logsumexp(beta) for beta in self.exponents)
        terms = logits.positive_terms
        return self.from_stats(RowStatistics(lse, logits.pos, logits.correction, logits.count, logits.scale, terms))

    def weighted(self, logits: DenseLogits) -> DenseLogits:
        """The whole matrix with constant weights on its negatives, for a loss that has such weights."""
        return logits

    def clamped(self, stats: RowStatistics) -> Tensor | None:
        """[R] bool, rows whose negatives get no gradient because of a floor; None for a loss without one."""
        return None


def check_row_loss(row_loss: object) -> None:
    """TypeError unless it is the instance of a `RowLoss`."""
    if not isinstance(row_loss, RowLoss):
        raise TypeError(f"row_loss must be a RowLoss, for instance Debiased(tau_plus=0.1); got {row_loss!r:.60}.")
