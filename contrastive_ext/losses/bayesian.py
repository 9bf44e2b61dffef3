"""Bayesian contrastive loss (BCL): every negative weighted by its rank among the negatives of its anchor.

    Ng_i = sum_j omega(u_ij) e^{s_ij},   u_ij = rank of s_ij in its row / N,     L_i = softplus(log Ng_i - p_i)

omega is the posterior probability of a true negative at that rank, times an importance weight that prefers hard ones;
its formula is in ranking.py. Ranks, and with them the weights, are constants of the gradient. Liu et al., 2023,
arXiv:2301.11673.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..batch.request import Request
from ..numerics import softplus
from ..problem.ranking import Ranking, Ranks, check_ranking, choose_ranks, histogram_axis
from .dense import DenseLogits
from .pair_loss import LossOptions, fused_row_loss, loss_function
from .prior import WithPrior, prior_of_rows
from .row_loss import RowStatistics
from .stats import LossStats


@dataclass(frozen=True)
class Bayesian(WithPrior):
    """The row loss softplus(log Ng - pos) with negatives weighted by rank."""

    alpha: float = 0.9
    beta: float = 0.9
    ranks: Ranks = "auto"
    bins: int = 256
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranking(self.tau_plus, self.alpha, self.beta, self.eps, self.ranks, self.bins)

    def check(self, request: Request) -> None:
        """Ranks are among candidates that all anchors share, that a guide scores all, and that have no other weight."""
        super().check(request)
        negatives, guide = request.negatives, request.guide
        if any(columns is not None and columns.log_weight is not None for columns in (request.queue, negatives)):
            raise ValueError(
                "the Bayesian loss weighs a column by its rank: there is no place for the log_weight of Columns."
            )
        if negatives is None:
            return
        if negatives.data.dim() == 3:
            raise ValueError(
                "the Bayesian loss ranks an anchor's candidates among those of all anchors: negatives must be [K, D], "
                f"the same for every anchor; got {list(negatives.data.shape)}."
            )
        if guide is not None and not guide.is_own and negatives.guide is None:
            raise ValueError(
                "the Bayesian loss ranks all candidates together, so that the guide has to score the negatives too: "
                "negatives=Columns(negatives, guide=features)."
            )

    def ranking(self, candidates: int) -> Ranking:
        """How negatives are weighted where every anchor has so many candidates."""
        bins = self.bins if choose_ranks(self.ranks, candidates) == "histogram" else 0
        return Ranking(self.tau_plus, self.alpha, self.beta, self.eps, bins)

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row."""
        (log_negatives,) = stats.lse
        return softplus(log_negatives - stats.pos)

    def weighted(self, logits: DenseLogits) -> DenseLogits:
        """Ranks of every row as their definition has them, exact or of a histogram, and the weights that they make."""
        ranking = self.ranking(logits.logits.shape[1])
        ranking = replace(ranking, tau_plus=prior_of_rows(self.tau_plus, logits.pos))
        rank = _histogram_ranks(logits, ranking.bins) if ranking.bins else _exact_ranks(logits)
        weight = ranking.weight_of_rank(rank, logits.count.clamp(min=1)[:, None])
        return replace(logits, log_weight=weight.log().masked_fill(~logits.negative, 0.0))

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] log(1 + Ng / e^p)."""
        return softplus(logits.logsumexp() - logits.pos)


def _exact_ranks(logits: DenseLogits) -> Tensor:
    """[R, C] how many negatives of the row are not larger."""
    x = logits.logits.detach().masked_fill(~logits.negative, -torch.inf)
    not_larger = torch.searchsorted(x.sort(1).values, x, right=True)  # ignored pairs come first
    return (not_larger - (~logits.negative).sum(1, keepdim=True)).to(x.dtype)


def _histogram_ranks(logits: DenseLogits, bins: int) -> Tensor:
    """[R, C] ranks interpolated in bins over the row's own range: below + frac (count - 1) + 1."""
    x, negative = logits.logits.detach(), logits.negative
    lowest, highest = x.masked_fill(~negative, torch.inf).amin(1), x.masked_fill(~negative, -torch.inf).amax(1)
    low, per_logit, _ = histogram_axis(lowest, highest, logits.count, bins)[:, :, None]
    position = ((x - low) * per_logit).clamp(0, bins).nan_to_num(nan=0.0)
    bin_of = position.long().clamp(max=bins - 1)
    counts = torch.zeros_like(x[:, :1]).repeat(1, bins).scatter_add(1, bin_of, negative.to(x.dtype))
    below, count = (y.gather(1, bin_of) for y in (counts.cumsum(1) - counts, counts))
    return below + (position - bin_of) * (count - 1) + 1


@loss_function
def fused_bayesian_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    tau_plus: float | Tensor = 0.1,
    alpha: float = 0.9,
    beta: float = 0.9,
    *,
    ranks: Ranks = "auto",
    bins: int = 256,
    eps: float = 1e-3,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """Bayesian contrastive loss (BCL) over a batch of pairs, without forming the similarity matrix.

    L_i = log(e^{p_i} + Ng_i) - p_i,  Ng_i = sum_j omega(u_ij) e^{s_ij},  u_ij = rank of s_ij in its row / N

    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair
    temperature  > 0, or a 0-d tensor to learn it; default 0.5
    tau_plus     in [0, 1), probability that a negative shares the anchor's class. Or constants, [B] of the pairs or
                 [2B] of the rows (two_view, symmetric): computed by backend "torch", which "auto" then takes
    alpha        in [0.5, 1], how well the encoder ranks a positive above a negative (its macro-AUC): see `linear_alpha`
                 and `estimate_alpha`; 0.5 knows nothing
    beta         in [0, 1], concentration on hard negatives; alpha = beta = 1 is refused
    ranks        "exact": every row is sorted, ties share the largest rank. "histogram": ranks interpolated in `bins`
                 bins over the row's range; with 256 bins and 1,024 anchors or more the loss is 4e-5 and the gradient
                 1e-3 from exact (docs/math.md); ties spread over their bin. "auto": exact up to 32,768 candidates per
                 anchor, histogram beyond (`explain` says which); torch.export with a dynamic batch wants ranks that are
                 named, or a `Dim` whose range lies on one side of that
    bins         from 2 to 65536, of a histogram; 4 bytes per anchor and bin
    eps          in [0, 1], the constant the released code adds to two denominators; 0 is the paper's formula
    options      layout, queue, negatives, normalize, reduction, ...: see `fused_row_loss`; negatives [K, D] only;
                 a group with exchange="ring" needs ranks="histogram" and makes three turns forward
    Returns      0-d float32 ("mean", "sum") or one value per anchor ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(B D) and a block of whole rows per thread (16 MiB, or four rows if those are longer); histogram: also
                 O(B bins). Time O(B^2 (D + log B)), exact
    Paper        Liu et al., 2023, arXiv:2301.11673
    """
    row_loss = Bayesian(tau_plus, alpha, beta, ranks, bins, eps)
    return fused_row_loss(row_loss, z1, z2, temperature, **options)
