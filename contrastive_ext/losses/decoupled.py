"""Decoupled contrastive learning: the positive leaves the denominator. Some libraries call it DCL, as debiased.py is.

    L_i = lse_i - w_i p_i                                     w_i = 1, or the DCLW weight 2 - B softmax_B(<a, b>/sigma)

Yeh et al., ECCV 2022, arXiv:2110.06848.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from ..batch.request import Request
from ..checks import check_tensor, describe
from ..problem.problem import Formula
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .row_loss import RowLoss, RowStatistics
from .stats import LossStats


@dataclass(frozen=True, eq=False)
class Decoupled(RowLoss):
    """The row loss lse - weight * pos; positive_weight [B] is shared by the anchors of an image, constant."""

    positive_weight: Tensor | None = None

    takes_directions = True

    def check(self, request: Request) -> None:
        """One weight for every pair."""
        super().check(request)
        weight, z1 = self.positive_weight, request.z1
        if weight is None:
            return
        check_tensor("positive_weight", weight)
        if weight.shape != z1.shape[:1] or weight.device != z1.device or not weight.is_floating_point():
            raise ValueError(
                f"positive_weight must be floating-point [{len(z1)}] on {z1.device}, one weight per pair; "
                f"got {describe(weight)}."
            )

    @property
    def formula(self) -> Formula | None:  # type: ignore[override]
        """The fused spelling; weights are a vector and have none."""
        return Formula("decoupled") if self.positive_weight is None else None

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        (lse,) = stats.lse
        return lse - self._weighted(stats.pos)

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] log of the sum over negatives alone, minus the positive."""
        return logits.logsumexp() - self._weighted(logits.pos)

    def _weighted(self, pos: Tensor) -> Tensor:
        if self.positive_weight is None:
            return pos
        weight = self.positive_weight.detach().to(pos.dtype)
        return pos * weight.repeat(pos.shape[0] // weight.shape[0])


@loss_function
def fused_decoupled_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    *,
    positive_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """Decoupled contrastive loss over a batch of pairs, without forming the similarity matrix.

    L_i = log sum over negatives of e^{s_ij} - w_i p_i

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; default 0.5
    positive_weight  [B] weight of each pair's positive, constant (DCLW: 2 - B softmax(<a, b>/sigma)); None is 1
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats, can be negative
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D); time O(B^2 D); once differentiable
    Paper        arXiv:2110.06848
    """
    return fused_row_loss(Decoupled(positive_weight), z1, z2, temperature, **options)
