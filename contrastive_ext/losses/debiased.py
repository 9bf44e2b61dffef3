"""Debiased contrastive loss: the negatives' sum corrected for the share tau of hidden positives.

    Ng_i = max( (sum_j e^{s_ij} - tau N e^{c_i}) / (1 - tau),  N e^{-1/t} ),     L_i = softplus(log Ng_i - p_i)

c_i = p_i, or the log-mean-exp over several `positives`. Computed in log space, where it stays exact for a converged row
and at low temperature. Rows whose corrected sum falls below the floor N e^{-1/t} give their negatives no gradient: at
t = .1 that is every row from tau = .01 on. Chuang et al., NeurIPS 2020, arXiv:2007.00224.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..numerics import softplus
from ..problem.problem import Formula
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .prior import WithPrior, prior_of_rows
from .row_loss import RowStatistics
from .stats import LossStats

_OVERWHELMED = 60.0  # e^60 times the sum itself: far below the floor, and finite in float32


def debias(log_sum: Tensor, stats: RowStatistics, tau_plus: float | Tensor) -> tuple[Tensor, Tensor]:
    """log Ng [R] for a sum of exponentials e^{log_sum} over negatives, and where the floor replaced it (bool [R])."""
    tau_plus = prior_of_rows(tau_plus, stats.pos)
    log_count = stats.count.log()
    log_floor = log_count - stats.scale
    shift = torch.maximum(log_sum, log_floor).detach()
    raw = torch.exp(log_sum - shift)
    if isinstance(tau_plus, Tensor) or tau_plus > 0:
        raw = raw - torch.exp((stats.correction + log_count + _log(tau_plus) - shift).clamp(max=_OVERWHELMED))
        raw = raw / (1 - tau_plus)
    # written so that NaN is not "clamped": it must reach the loss
    clamped = (raw < torch.exp(log_floor - shift)) | (raw <= 0)
    log_raw = shift + raw.masked_fill(clamped, 1.0).log()
    return torch.where(clamped, log_floor, log_raw), clamped


def dense_debias(sum_exp: Tensor, logits: DenseLogits, shift: Tensor, tau_plus: float | Tensor) -> Tensor:
    """[R] log(1 + Ng / e^p) with Ng as in the paper, every exponential taken relative to e^shift."""
    tau_plus = prior_of_rows(tau_plus, logits.pos)
    tiny = torch.finfo(shift.dtype).tiny  # log 0 has no gradient
    floor = logits.count * torch.exp(-logits.scale - shift)
    corrected = sum_exp
    if isinstance(tau_plus, Tensor) or tau_plus > 0:  # `positives` may lie far above everything else in the row
        share = torch.exp((logits.correction + _log(tau_plus) - shift).clamp(max=_OVERWHELMED))
        corrected = (sum_exp - logits.count * share) / (1 - tau_plus)
    on_floor = (corrected < floor) | (corrected <= tiny)  # a sum that equals the floor keeps its gradient
    # the floor by its logarithm: far below e^shift it underflows
    log_negatives = torch.where(on_floor, logits.count.log() - logits.scale, corrected.clamp(min=tiny).log() + shift)
    return softplus(log_negatives - logits.pos)


def _log(tau_plus: float | Tensor) -> float | Tensor:
    return tau_plus.log() if isinstance(tau_plus, Tensor) else math.log(tau_plus)


@dataclass(frozen=True)
class Debiased(WithPrior):
    """The row loss softplus(log Ng - pos) with the debiased negatives' sum Ng."""

    @property
    def formula(self) -> Formula | None:  # type: ignore[override]
        """The fused spelling, of one prior."""
        return None if isinstance(self.tau_plus, Tensor) else Formula("debiased", (self.tau_plus,))

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        (lse,) = stats.lse
        log_negatives, _ = debias(lse, stats, self.tau_plus)
        return softplus(log_negatives - stats.pos)

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] the paper's formula on the whole matrix."""
        shift = logits.shift()
        return dense_debias(logits.sum_exp(1.0, shift), logits, shift, self.tau_plus)

    def clamped(self, stats: RowStatistics) -> Tensor:
        """[R] bool, rows on the floor: no gradient reaches their negatives."""
        return debias(stats.lse[0], stats, self.tau_plus)[1]


@loss_function
def fused_debiased_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    tau_plus: float | Tensor = 0.1,
    *,
    positives: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """Debiased contrastive loss over a batch of pairs, without forming the similarity matrix.

    L_i = log(e^{p_i} + Ng_i) - p_i,  Ng_i = max((sum_j e^{s_ij} - tau N e^{p_i}) / (1 - tau), N e^{-1/t})

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; cosine units; default 0.5
    tau_plus     in [0, 1), probability that a negative shares the anchor's class; 0 is InfoNCE. Or
                 constants, [B] of the pairs or [2B] of the rows (two_view, symmetric)
    positives    [M, B, D] further views of each image that estimate the correction term in place of the partner
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D); time O(B^2 D); once differentiable
    Paper        Chuang et al., NeurIPS 2020, arXiv:2007.00224
    """
    return fused_row_loss(Debiased(tau_plus), z1, z2, temperature, positives=positives, **options)
