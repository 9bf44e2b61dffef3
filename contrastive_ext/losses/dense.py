"""The dense reference: the similarity matrix in memory, plain PyTorch, the truth every backend is held to.

`backend="reference"` of every loss runs this file: same arrangement of the batch, then the whole matrix of logits and a
mask of negatives built from the definition, then the loss's `dense` formula. Any dtype, twice differentiable, O(N M).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.arrangement import Arrangement
from ..batch.columns import ColumnSet
from ..numerics import own_products, product
from ..problem.pairs import UNFILLED


@dataclass(frozen=True)
class DenseLogits:
    """All logits of all anchors.

    logits      [R, C] scale * <anchor, candidate>
    negative    [R, C] bool, which candidates are negatives
    pos         [R] logit of the positive
    correction  [R] log-mean-exp of the debiasing positives (pos unless `positives` was given)
    scale       1/temperature, [R] where the rows have their own
    log_weight  [R, C] log of a constant weight on e^logit of every negative; None: all count alike
    positive_terms  how often e^pos stands in the denominator
    plain       [R, C] the logits without hardness and weights of columns; None: `logits`
    """

    logits: Tensor
    negative: Tensor
    pos: Tensor
    correction: Tensor
    scale: float | Tensor
    log_weight: Tensor | None = None
    positive_terms: int = 1
    plain: Tensor | None = None

    @property
    def similarities(self) -> Tensor:
        """[R, C] the logits without what is added to them."""
        return self.logits if self.plain is None else self.plain

    @property
    def count(self) -> Tensor:
        """[R] number of negatives."""
        return self.negative.sum(1).to(self.logits.dtype)

    def shift(self) -> Tensor:
        """[R] the largest logit of the row, positive included: exp(x - shift) neither overflows nor all underflows."""
        largest = self.logits.masked_fill(~self.negative, -torch.inf).amax(1)
        return torch.maximum(largest, self.pos).detach()

    def sum_exp(self, exponent: float, shift: Tensor) -> Tensor:
        """[R] sum over negatives of exp(exponent * (x - shift))."""
        terms = torch.exp(exponent * (self.logits - shift[:, None]).masked_fill(~self.negative, -torch.inf))
        return terms.sum(1)

    def logsumexp(self, exponent: float = 1.0) -> Tensor:
        """[R] log sum over negatives of (weight exp(x))^exponent; rows without any give -inf and no gradient."""
        weighted = self.logits if self.log_weight is None else self.logits + self.log_weight
        masked = (exponent * weighted).masked_fill(~self.negative, -torch.inf)
        empty = (masked == -torch.inf).all(1)
        return masked.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)

    def weight_statistics(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """[R] mean and largest weight of the negatives; None for a loss without weights."""
        if self.log_weight is None:
            return None, None
        weight = self.log_weight.exp().masked_fill(~self.negative, 0.0)
        return weight.sum(1) / self.count.clamp(min=1), weight.amax(1)


def dense_logits(batch: Arrangement, hardness_of: Callable[[bool], float]) -> DenseLogits:
    """The whole problem of `batch` as one matrix; hardness_of(own) as `RowLoss` has it."""
    blocks = []  # logits, which are negatives, logits with what is added to them
    for columns in batch.column_sets:
        logits, kept, kept_reverse = _block(batch, columns)
        if batch.symmetric:
            logits, kept = torch.cat([logits, logits.T]), torch.cat([kept, kept_reverse.T])
        hardness = hardness_of(False) if columns.of_documents else 0.0
        blocks.append((logits, kept, _added(logits, batch.scale, hardness, columns.log_weight)))
    if batch.own is not None:
        logits = batch.scale * own_products(batch.anchors, batch.own.v)
        kept = torch.ones_like(logits, dtype=torch.bool) if batch.own.kept is None else batch.own.kept
        blocks.append((logits, kept, _added(logits, batch.scale, hardness_of(True), batch.own.log_weight)))
    plain, kept, added = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    same = all(logits is with_added for logits, _, with_added in blocks)
    return DenseLogits(
        plain if same else added, kept, batch.pos, batch.correction, batch.row_scale,
        positive_terms=batch.positive_terms, plain=plain,
    )  # fmt: skip


def _added(logits: Tensor, scale: float | Tensor, hardness: float, log_weight: Tensor | None) -> Tensor:
    """The logits with hardness times the constant cosine, and the weights of the columns."""
    if hardness:
        logits = logits + (hardness / scale * logits).detach()
    return logits if log_weight is None else logits + log_weight.to(logits.dtype)


def _block(batch: Arrangement, columns: ColumnSet) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, which columns are negatives of which rows, and which rows are negatives of which columns."""
    rows = batch.anchors if columns.rows is None else columns.rows
    v = rows if columns.v is None else columns.v
    logits = batch.scale * product(rows, v.T)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if columns.num_images:
        image = torch.arange(rows.shape[0], device=rows.device) % columns.num_images
        image_of_column = torch.full(v.shape[:1], -1, device=rows.device)
        image_of_column[columns.positive_offset : columns.positive_offset + rows.shape[0]] = image
        kept &= image[:, None] != image_of_column[None, :]
    if columns.ignored is not None:
        kept = kept.scatter(1, columns.ignored, False)
    if columns.ids is not None:
        kept &= columns.ids[None, :] != UNFILLED
        if batch.anchor_ids is not None:
            kept &= batch.anchor_ids[:, None] != columns.ids[None, :]
    if columns.gate is None:
        return logits, kept, kept
    gate = columns.gate
    score = (gate.scorers @ gate.features.T).amax(0)
    kept_reverse = kept if gate.col_limit is None else kept & ~(score > gate.col_limit[None, :])
    return logits, kept & ~(score > gate.row_limit[:, None]), kept_reverse
