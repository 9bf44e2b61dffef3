"""The in-batch losses of sentence-transformers (5.1 to 6.2), without the matrix of scores, and our losses as losses of
it: `from contrastive_ext.adapters.sentence_transformers import MultipleNegativesRankingLoss`.

They are subclasses of the host's that compute the loss from embeddings, so that its trainer, model cards,
multi-dataset and gradient-cached training work as they do there. Every class takes `row_loss=` beside the host's
arguments, for instance `Debiased(tau_plus=0.1)`, `HardNegative()` or `Bayesian()`; those want a lower scale than 20:
at temperature .05 every anchor of a debiased loss is on its floor.

What differs. `similarity_fct` must be `util.cos_sim` or `util.dot_score`, whose products can be streamed.
`directions` beyond ("query_to_doc",), and ("query_to_doc", "doc_to_query") per direction, are refused for now, as is
`hardness_mode`. Embeddings of 16 bits are computed in float32. The cached twins compute the loss of a batch in one
pass: `mini_batch_size` divides the encoder's work alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch.call import check_call
from ..batch.request import Layout
from ..losses.bayesian import Bayesian
from ..losses.debiased import Debiased
from ..losses.decoupled import Decoupled
from ..losses.hard_negative import HardNegative
from ..losses.infonce import InfoNCE
from ..losses.pair_loss import fused_row_loss
from ..losses.row_loss import RowLoss, check_row_loss
from ..modules import FalseNegativeLoss
from .hosts import all_ranks_if, alone, missing

try:
    from sentence_transformers import util

    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:  # before 5.4
        from sentence_transformers import losses
except ImportError as error:
    raise missing("sentence-transformers", "sentence-transformers") from error

FORWARD, BACKWARD = "query_to_doc", "doc_to_query"
PAPERS = {
    Debiased: ("Debiased Contrastive Learning", "2007.00224", 2020),
    HardNegative: ("Contrastive Learning with Hard Negative Samples", "2010.04592", 2020),
    Bayesian: ("Bayesian Self-Supervised Contrastive Learning", "2301.11673", 2023),
    Decoupled: ("Decoupled Contrastive Learning", "2110.06848", 2021),
}
FALSE_NEGATIVES = ("Boosting Contrastive Self-Supervised Learning with False Negative Cancellation", "2011.11765", 2020)


def _citation(title: str, arxiv: str, year: int) -> str:
    key = f"arxiv{arxiv.replace('.', '')}"
    fields = {"title": title, "year": year, "eprint": arxiv, "archivePrefix": "arXiv", "primaryClass": "cs.LG"}
    return f"\n@misc{{{key},\n" + ",\n".join(f"    {name}={{{x}}}" for name, x in fields.items()) + "\n}\n"


class _FromEmbeddings:
    """What the classes share: the loss from embeddings, and what of the host's options can be streamed."""

    row_loss: RowLoss
    scale: float
    similarity_fct: Callable[[Tensor, Tensor], Tensor]
    gather_across_devices: bool

    def _check(self, row_loss: RowLoss) -> None:
        check_row_loss(row_loss)
        check_call({"logit_scale": self.scale})
        self.row_loss = row_loss
        if self.similarity_fct not in (util.cos_sim, util.pytorch_cos_sim, util.dot_score):
            raise ValueError(
                "similarity_fct must be sentence_transformers.util.cos_sim or dot_score, whose products can be "
                f"streamed; got {self.similarity_fct!r}. Others need the host's own loss."
            )
        directions, mode = set(getattr(self, "directions", (FORWARD,))), getattr(self, "partition_mode", "joint")
        if directions != {FORWARD} and (directions, mode) != ({FORWARD, BACKWARD}, "per_direction"):
            raise ValueError(
                f"directions={tuple(sorted(directions))} with partition_mode={mode!r}: one denominator over several "
                f"directions is not streamed yet; give ('{FORWARD}',), or ('{FORWARD}', '{BACKWARD}') with "
                "partition_mode='per_direction', or use the host's own loss."
            )
        if getattr(self, "hardness_mode", None) is not None and self.hardness_strength > 0:  # type: ignore[attr-defined]
            raise ValueError(
                f"hardness_mode={self.hardness_mode!r}: "  # type: ignore[attr-defined]
                "added similarities are not streamed yet; give row_loss=HardNegative(tau_plus=0.0, beta=...), which "
                "weighs hard negatives too, or use the host's own loss."
            )

    def _loss(self, embeddings: list[Tensor]) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"a loss of pairs needs at least two columns, anchor and positive; got {len(embeddings)}.")
        queries, positives = embeddings[:2]
        both = set(getattr(self, "directions", (FORWARD,))) == {FORWARD, BACKWARD}

        def loss(z1: Tensor, z2: Tensor, layout: Layout) -> Tensor:
            found = fused_row_loss(
                self.row_loss, z1, z2, logit_scale=self.scale, layout=layout,
                normalize=self.similarity_fct is not util.dot_score, group=all_ranks_if(self.gather_across_devices),
            )  # fmt: skip
            return alone(found)

        if not both:
            return loss(queries, torch.cat(embeddings[1:]), "one_way")
        if len(embeddings) == 2:
            return loss(queries, positives, "symmetric")
        # hard negatives are documents of the forward direction alone
        return (loss(queries, torch.cat(embeddings[1:]), "one_way") + loss(positives, queries, "one_way")) / 2

    def get_config_dict(self) -> dict[str, Any]:
        """The host's, and the row loss where it is another."""
        own = {} if self.row_loss == InfoNCE() else {"row_loss": repr(self.row_loss)}
        return {**super().get_config_dict(), **own}  # type: ignore[misc]

    @property
    def citation(self) -> str:
        """Of the row loss, the host's for InfoNCE."""
        paper = PAPERS.get(type(self.row_loss))
        return super().citation if paper is None else _citation(*paper)  # type: ignore[misc]


class MultipleNegativesRankingLoss(_FromEmbeddings, losses.MultipleNegativesRankingLoss):
    """The host's loss over (anchor, positive[, negatives]); arguments as there, of its version.

    row_loss   what a row computes; a `RowLoss`
    Memory     O(B D) beside the model's, time O(B^2 D); once differentiable
    """

    def __init__(self, model, *args, row_loss: RowLoss = InfoNCE(), **kwargs):  # noqa: B008, a frozen dataclass
        super().__init__(model, *args, **kwargs)
        self._check(row_loss)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """0-d loss of the embeddings [B, D] of every column."""
        return self._loss(embeddings)


class CachedMultipleNegativesRankingLoss(_FromEmbeddings, losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` that embeds in mini-batches (GradCache); arguments as in the host's version."""

    def __init__(self, model, *args, row_loss: RowLoss = InfoNCE(), **kwargs):  # noqa: B008, a frozen dataclass
        super().__init__(model, *args, **kwargs)
        self._check(row_loss)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """0-d loss of the representations of all mini-batches; `with_backward` also gives them their gradients."""
        loss = self._loss([torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _both_directions(loss: type) -> dict[str, Any]:
    """Arguments that make the host's loss symmetric, of versions that have them."""
    known = loss.__init__.__code__.co_varnames  # type: ignore[misc]
    return {"directions": (FORWARD, BACKWARD), "partition_mode": "per_direction"} if "directions" in known else {}


class _Symmetric:
    def _check(self, row_loss: RowLoss) -> None:
        if not hasattr(self, "directions"):  # before 5.3
            self.directions, self.partition_mode = (FORWARD, BACKWARD), "per_direction"
        super()._check(row_loss)  # type: ignore[misc]


class MultipleNegativesSymmetricRankingLoss(_Symmetric, MultipleNegativesRankingLoss):
    """Anchors among documents and positives among anchors, the mean of both; negatives join the first alone."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **_both_directions(losses.MultipleNegativesRankingLoss), **kwargs)


class CachedMultipleNegativesSymmetricRankingLoss(_Symmetric, CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesSymmetricRankingLoss` that embeds in mini-batches (GradCache)."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **_both_directions(losses.CachedMultipleNegativesRankingLoss), **kwargs)


class FalseNegativeRankingLoss(losses.MultipleNegativesRankingLoss):
    """`fused_false_negative_loss` over the columns as views: false negatives in the batch are found and cancelled.

    scale      1/temperature
    mode, top_k, threshold, aggregate   see `fused_false_negative_loss`
    Every column after the anchor is a positive of it: hard negatives have no place here.
    """

    def __init__(
        self,
        model,
        scale: float = 10.0,
        mode: Literal["attract", "eliminate"] = "eliminate",
        top_k: int | None = 10,
        threshold: float | None = 0.7,
        aggregate: Literal["max", "mean"] = "max",
    ):
        super().__init__(model, scale=scale)
        self.options: dict[str, Any] = {"mode": mode, "top_k": top_k, "threshold": threshold, "aggregate": aggregate}
        self.views_loss = FalseNegativeLoss(logit_scale=scale, **self.options)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """0-d loss of the embeddings [B, D] of every column."""
        return alone(self.views_loss(torch.stack(embeddings)))

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {"scale": self.scale, **self.options}

    @property
    def citation(self) -> str:
        """Of false-negative cancellation."""
        return _citation(*FALSE_NEGATIVES)
