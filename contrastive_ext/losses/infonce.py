"""InfoNCE (NT-Xent, and with layout="symmetric" the CLIP loss).

    L_i = log(e^{p_i} + sum_j e^{s_ij}) - p_i = softplus(lse_i - p_i)          sum over the negatives of row i

van den Oord et al., 2018, arXiv:1807.03748; Chen et al., ICML 2020, arXiv:2002.05709; Radford et al., ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from ..numerics import softplus
from ..problem.problem import Formula
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .row_loss import RowLoss, RowStatistics
from .stats import LossStats


@dataclass(frozen=True)
class InfoNCE(RowLoss):
    """The row loss softplus(lse - pos)."""

    formula = Formula("infonce")

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        (lse,) = stats.lse
        return softplus(lse - stats.pos)

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] -log(e^p / (e^p + sum)) = log(1 + sum / e^p)."""
        return softplus(logits.logsumexp() - logits.pos)


@loss_function
def fused_infonce_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor | None = None, **options: Unpack[LossOptions]
) -> Tensor | tuple[Tensor, LossStats]:
    """InfoNCE / NT-Xent over a batch of pairs, without forming the similarity matrix.

    L_i = log(e^{p_i} + sum over negatives of e^{s_ij}) - p_i

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; default 0.5
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D); time O(B^2 D); once differentiable
    Paper        arXiv:1807.03748, arXiv:2002.05709; CLIP (layout="symmetric") arXiv:2103.00020
    """
    return fused_row_loss(InfoNCE(), z1, z2, temperature, **options)
