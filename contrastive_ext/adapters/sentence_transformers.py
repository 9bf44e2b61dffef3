"""The in-batch losses of sentence-transformers (5.1 to 6.2), without the matrix of scores, and our losses as losses of
it: `from contrastive_ext.adapters.sentence_transformers import MultipleNegativesRankingLoss`.

They are subclasses of the host's that compute the loss from embeddings, so that its trainer, model cards,
multi-dataset and gradient-cached training work as they do there. Every class takes `row_loss=` beside the host's
arguments, for instance `Debiased(tau_plus=0.1)`, `HardNegative()` or `Bayesian()`; those want a lower scale than 20:
at temperature .05 every anchor of a debiased loss is on its floor.

What differs. `similarity_fct` must be `util.cos_sim` or `util.dot_score`, whose products can be streamed. Several
`directions` in one denominator are InfoNCE's and decoupled's, `hardness_mode` is InfoNCE's. Embeddings of 16 bits are
computed in float32. The cached twins compute the loss of a batch in one pass: `mini_batch_size` divides the encoder's
work alone. `GISTEmbedLoss` never cancels a positive and never has a row among its own negatives, and keeps ties with
the limit that rounding would decide; with `gather_across_devices` the anchors of all ranks are candidates, where the
host takes those of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.call import check_call
from ..batch.cancellation import Guide
from ..batch.columns import Columns
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

try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
except ImportError:  # before 6

    def embed_columns(model, features_list):
        return [model(features)["sentence_embedding"] for features in features_list]


FORWARD, BACKWARD = "query_to_doc", "doc_to_query"
NAMES = {FORWARD: "q2d", "query_to_query": "q2q", BACKWARD: "d2q", "doc_to_doc": "d2d"}
HARDNESS = {"in_batch_negatives": "in_batch", "hard_negatives": "own", "all_negatives": "all"}
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
        if self._hardness().hardness > 0 and row_loss != InfoNCE():
            raise ValueError(
                f"hardness_mode={self.hardness_mode!r} is InfoNCE's; got row_loss={row_loss!r}. "  # type: ignore[attr-defined]
                "HardNegative weighs hard negatives itself."
            )
        if self._directions() != {FORWARD} and self._is_joint() and not row_loss.takes_directions:
            raise ValueError(
                f"{row_loss!r} is not defined for one denominator over directions={tuple(sorted(self._directions()))}; "
                "give partition_mode='per_direction', or InfoNCE()."
            )

    def _directions(self) -> set[str]:
        return set(getattr(self, "directions", (FORWARD,)))

    def _is_joint(self) -> bool:
        return getattr(self, "partition_mode", "joint") == "joint"

    def _joint(self) -> Layout:
        return tuple(NAMES[name] for name in NAMES if name in self._directions())  # type: ignore[misc]

    def _hardness(self) -> InfoNCE:
        """InfoNCE as the host's `hardness_mode` has it."""
        mode = getattr(self, "hardness_mode", None)
        return InfoNCE() if mode is None else InfoNCE(self.hardness_strength, HARDNESS[mode])  # type: ignore[attr-defined]

    def _loss(self, embeddings: list[Tensor]) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"a loss of pairs needs at least two columns, anchor and positive; got {len(embeddings)}.")
        queries, positives = embeddings[:2]
        documents, own = torch.cat(embeddings[1:]), embeddings[2:]
        forward: dict[str, Any] = {"layout": "one_way"}
        row_loss = self.row_loss if self._hardness().hardness == 0 else self._hardness()
        if self._is_joint() and self._directions() != {FORWARD}:
            forward["layout"] = self._joint()
        if own and (forward["layout"] != "one_way" or row_loss != self.row_loss):
            # documents of a query drop out by its id, its own hard negatives come back as its own
            rank = dist.get_rank() if self.gather_across_devices and dist.is_initialized() else 0
            images = rank * len(queries) + torch.arange(len(queries), device=queries.device)
            forward |= {"ids": images.repeat(len(embeddings) - 1), "negatives": torch.stack(own, 1)}

        def loss(row_loss: RowLoss, z1: Tensor, z2: Tensor, **how) -> Tensor:
            return alone(fused_row_loss(
                row_loss, z1, z2, logit_scale=self.scale, normalize=self.similarity_fct is not util.dot_score,
                group=all_ranks_if(self.gather_across_devices), **how,
            ))  # fmt: skip

        if self._is_joint() or self._directions() == {FORWARD}:
            return loss(row_loss, queries, documents, **forward)
        if not own and row_loss == self.row_loss:
            return loss(row_loss, queries, positives, layout="symmetric")
        # hard negatives are documents of the forward direction alone
        backward = loss(self.row_loss, positives, queries, layout="one_way")
        return (loss(row_loss, queries, documents, **forward) + backward) / 2

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
        return _cached(self._loss([torch.cat(column) for column in reps]), with_backward)


def _cached(loss: Tensor, with_backward: bool) -> Tensor:
    """The loss as the cached losses of the host want it, its gradient taken already or not."""
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


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


class _Guided:
    """What the losses with a guide model share; the host's attributes."""

    temperature: float
    margin_strategy: str
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    gather_across_devices: bool

    def _loss(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """0-d loss of columns [B, D] and the guide's [B, E] of each: anchors, positives and hard negatives."""
        if len(embeddings) < 2 or len(embeddings) != len(guides):
            raise ValueError(
                "a guided loss needs anchors, positives and what the guide says of each; "
                f"got {len(embeddings)} and {len(guides)} columns."
            )
        (anchors, positives, *negatives), (g1, g2, *of_negatives) = embeddings, guides
        also = {"q2q": self.contrast_anchors, "d2d": self.contrast_positives}
        columns = Columns(torch.cat(negatives), guide=torch.cat(of_negatives)) if negatives else None
        return alone(fused_row_loss(
            InfoNCE(), anchors, positives, self.temperature, negatives=columns,
            layout=("q2d", *(name for name, wanted in also.items() if wanted)),  # type: ignore[arg-type]
            guide=Guide(g1, g2, self.margin, self.margin_strategy == "relative"),
            group=all_ranks_if(self.gather_across_devices),
        ))  # fmt: skip


class GISTEmbedLoss(_Guided, losses.GISTEmbedLoss):
    """The host's loss of (anchor, positive[, negatives]) with a guide model for false negatives; arguments as there.

    Memory     O(B (D + E)) beside the models', time O(B^2 (D + E)), E features of the guide; once differentiable
    """

    def forward(self, sentence_features, labels: Tensor | None = None) -> Tensor:
        """0-d loss of tokenized columns."""
        columns = list(sentence_features)
        with torch.no_grad():  # before the model, which writes into the features
            guides = embed_columns(self.guide, [self._for_guide(column) for column in columns])
        return self._loss(embed_columns(self.model, columns), guides)

    def _for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.must_retokenize:
            return dict(column)
        tokens: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # sentences end to end, without padding
            tokens = [x.tolist() for x in tokens[0].split(column["cu_seq_lens_q"].diff().tolist())]
        sentences = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        made = self.guide.preprocess(sentences) if hasattr(self.guide, "preprocess") else self.guide.tokenize(sentences)
        return util.batch_to_device(made, self.guide.device)


class CachedGISTEmbedLoss(_Guided, losses.CachedGISTEmbedLoss):
    """`GISTEmbedLoss` that embeds in mini-batches (GradCache); arguments as in the host's version."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """0-d loss of the representations of all mini-batches; `with_backward` also gives them their gradients."""
        return _cached(self._loss(*([torch.cat(x) for x in columns] for columns in (reps, reps_guided))), with_backward)


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
