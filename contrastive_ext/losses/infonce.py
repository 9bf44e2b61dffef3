"""InfoNCE (NT-Xent, and with layout="symmetric" the CLIP loss).

    L_i = log(e^{p_i} + sum_j e^{s_ij}) - p_i = softplus(lse_i - p_i)          sum over the negatives of row i

van den Oord et al., 2018, arXiv:1807.03748; Chen et al., ICML 2020, arXiv:2002.05709; Radford et al., ICML 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from ..batch.request import Request
from ..checks import check_choice, check_number
from ..numerics import softplus
from ..problem.problem import Formula
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .row_loss import RowLoss, RowStatistics
from .stats import LossStats

HARDNESS = ("in_batch", "own", "all")


@dataclass(frozen=True)
class InfoNCE(RowLoss):
    """The row loss log(m + e^{lse - pos}); m = 1, or 2 where a layout has the positive in the sum twice.

    hardness     >= 0, times the constant cosine is added to the logits of negatives
    hardness_on  which: "own" explicit ones [B, n, D], "in_batch" everything else of "q2d", "all" both
    """

    hardness: float = 0.0
    hardness_on: str = "in_batch"

    takes_directions = True

    def __post_init__(self) -> None:
        check_number("hardness", self.hardness)
        if not 0 <= self.hardness < float("inf"):
            raise ValueError(f"hardness must be finite and >= 0; got {self.hardness}.")
        check_choice("hardness_on", self.hardness_on, HARDNESS)

    @property
    def formula(self) -> Formula | None:  # type: ignore[override]
        """The fused spelling, of plain logits."""
        return Formula("infonce") if self.hardness == 0 else None

    def check(self, request: Request) -> None:
        """Hardness is that of z1 against documents."""
        super().check(request)
        if self.hardness > 0 and not request.is_one_way:
            raise ValueError(f"hardness needs layout='one_way' or a tuple; got layout={request.layout!r}.")
        if self.hardness > 0 and request.scale_of_rows:
            raise ValueError("hardness needs one temperature for all rows, not one of each.")

    def hardness_of(self, own: bool) -> float:
        """What is added, times the constant cosine, to the logits of an anchor's own or of all other candidates."""
        return self.hardness if self.hardness_on in ("all", "own" if own else "in_batch") else 0.0

    def without_negatives(self, positive_terms: int) -> float:
        """The positive alone in the sum, once or twice."""
        return math.log(positive_terms)

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        (lse,) = stats.lse
        return _joined(lse - stats.pos, stats.positive_terms)

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] -log(e^p / (m e^p + sum)) = log(m + sum / e^p)."""
        return _joined(logits.logsumexp() - logits.pos, logits.positive_terms)


def _joined(gap: Tensor, positive_terms: int) -> Tensor:
    """log(m + e^gap)."""
    return softplus(gap) if positive_terms == 1 else softplus(gap - math.log(positive_terms)) + math.log(positive_terms)


@loss_function
def fused_infonce_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    *,
    hardness: float = 0.0,
    hardness_on: Literal["in_batch", "own", "all"] = "in_batch",
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """InfoNCE / NT-Xent over a batch of pairs, without forming the similarity matrix.

    L_i = log(e^{p_i} + sum over negatives of e^{s_ij}) - p_i

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; default 0.5
    hardness     >= 0, alpha of the logits s_ij + alpha cos_ij of negatives, whose second part is constant (one-way and
                 tuples as layout)
    hardness_on  which negatives: "own" (`negatives` [B, n, D]), "in_batch" (everything else of z1 against documents) or
                 "all"
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D); time O(B^2 D); once differentiable
    Paper        arXiv:1807.03748, arXiv:2002.05709; CLIP (layout="symmetric") arXiv:2103.00020
    """
    return fused_row_loss(InfoNCE(hardness, hardness_on), z1, z2, temperature, **options)
