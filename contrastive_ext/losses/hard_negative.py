"""Hard negatives: every negative weighted by e^{beta s_ij}, then debiased.

    R_i = N sum_j e^{(1+beta) s_ij} / sum_j e^{beta s_ij},   Ng_i = max((R_i - tau N e^{c_i})/(1 - tau), N e^{-1/t})

The released code differentiates through the weights, so single negatives can be pulled closer; `detach_weights=True`
holds them constant. beta = 0 is the debiased loss. Robinson et al., ICLR 2021, arXiv:2010.04592.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_number
from ..numerics import softplus
from ..problem.problem import Formula
from .debiased import debias, dense_debias
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .prior import WithPrior
from .row_loss import RowStatistics
from .stats import LossStats


@dataclass(frozen=True)
class HardNegative(WithPrior):
    """The row loss softplus(log Ng - pos) with importance-weighted, debiased negatives."""

    beta: float = 1.0
    detach_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta, the concentration on hard negatives, must be finite and >= 0; got {self.beta}.")

    @property
    def exponents(self) -> tuple[float, ...]:  # type: ignore[override]
        """beta and 1 + beta; beta = 0 needs one sweep statistic only."""
        return (self.beta, 1.0 + self.beta) if self.beta > 0 else (1.0,)

    @property
    def formula(self) -> Formula | None:  # type: ignore[override]
        """The fused spelling, of one prior; beta = 0 is the debiased loss."""
        if isinstance(self.tau_plus, Tensor):
            return None
        if self.beta == 0:
            return Formula("debiased", (self.tau_plus,))
        return Formula("hard_negative", (self.tau_plus, self.beta, float(self.detach_weights)))

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        log_negatives, _ = debias(self._log_reweighted_sum(stats), stats, self.tau_plus)
        return softplus(log_negatives - stats.pos)

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] the released code's formula on the whole matrix."""
        shift = logits.logits.masked_fill(~logits.negative, -torch.inf).amax(1).detach()
        relative = (logits.logits - shift[:, None]).masked_fill(~logits.negative, -torch.inf)
        weights = torch.exp(self.beta * relative).masked_fill(~logits.negative, 0.0)
        weights = logits.count[:, None] * weights / weights.sum(1, keepdim=True)
        if self.detach_weights:
            weights = weights.detach()
        common = logits.shift()  # the positive may lie above every negative: e^{shift - common} <= 1
        reweighted = (weights * relative.exp()).sum(1) * torch.exp(shift - common)
        return dense_debias(reweighted, logits, common, self.tau_plus)

    def clamped(self, stats: RowStatistics) -> Tensor:
        """[R] bool, rows on the floor: no gradient reaches their negatives."""
        return debias(self._log_reweighted_sum(stats), stats, self.tau_plus)[1]

    def _log_reweighted_sum(self, stats: RowStatistics) -> Tensor:
        if len(stats.lse) == 1:
            return stats.lse[0]
        weight_norm, log_sum = stats.lse
        if self.detach_weights:  # d log_sum / ds carries a factor 1 + beta, of which the weights' share beta is dropped
            log_sum = log_sum.detach() + (log_sum - log_sum.detach()) / (1.0 + self.beta)
            weight_norm = weight_norm.detach()
        return stats.count.log() + log_sum - weight_norm


@loss_function
def fused_hard_negative_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    tau_plus: float | Tensor = 0.1,
    beta: float = 1.0,
    *,
    detach_weights: bool = False,
    positives: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """Hard-negative contrastive loss (HCL) over a batch of pairs, without forming the similarity matrix.

    L_i = log(e^{p_i} + Ng_i) - p_i,  Ng_i = max((R_i - tau N e^{p_i}) / (1 - tau), N e^{-1/t}),
    R_i = N sum_j e^{(1+beta) s_ij} / sum_j e^{beta s_ij}

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; cosine units; default 0.5
    tau_plus     in [0, 1), probability that a negative shares the anchor's class. Or
                 constants, [B] of the pairs or [2B] of the rows (two_view, symmetric)
    beta         >= 0, concentration on hard negatives; 0 is the debiased loss. (1 + beta)/temperature goes up to 65,536
                 (float64 3.5e13): rounding leaves the difference of two log-sum-exps no second decimal there
    detach_weights  hold the weights constant in the gradient; the released code does not
    positives    [M, B, D] further views of each image that estimate the correction term in place of the partner
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D); time O(B^2 D); once differentiable
    Paper        Robinson et al., ICLR 2021, arXiv:2010.04592
    """
    row_loss = HardNegative(tau_plus, beta, detach_weights)
    return fused_row_loss(row_loss, z1, z2, temperature, positives=positives, **options)
