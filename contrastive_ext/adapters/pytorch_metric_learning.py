"""`SupConLoss` and `NTXentLoss` of pytorch-metric-learning, without the matrix of similarities: `from
contrastive_ext.adapters.pytorch_metric_learning import SupConLoss`.

They are subclasses of the host's that compute the losses of rows and pairs; reducers, regularizers,
`SelfSupervisedLoss`, `CrossBatchMemory` and `DistributedLossWrapper` do what they do there. (The wrapper's value is
world_size times the loss, its gradient that of the whole batch; with `efficient=True` it is not.)

What differs. Distances other than CosineSimilarity and DotProductSimilarity are refused. Of rows with several positives
`NTXentLoss` has the mean over pairs alone, no loss of every pair: other reducers than MeanReducer are refused then.
`indices_tuple` is taken where it says what the labels say, checked by numbers and sums of indices; pairs that a miner
chose are refused. 16-bit embeddings are computed in float32. Memory is O((N + M) D) without an `indices_tuple`;
CrossBatchMemory itself makes all N x M pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .. import numerics
from ..batch.call import check_call
from ..losses.labelled_infonce import sums_over_positives
from ..losses.supcon import out_against
from ..operators.unit_rows import operand
from ..problem.pairs import integers
from .hosts import missing, rows_first

try:
    from pytorch_metric_learning import distances, losses, reducers
except ImportError as error:
    raise missing("pytorch-metric-learning", "pytorch-metric-learning") from error


class _RowLosses:
    """What both losses share: who is whose positive, and the losses of rows."""

    temperature: float
    distance: distances.DotProductSimilarity
    zero_losses: Callable[[], dict]

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """The host's record of the losses, `_reported` by the loss."""
        found = self._row_losses(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return self.zero_losses() if found is None else {"loss": self._reported(*found)}

    @abstractmethod
    def _reported(self, rows: Tensor, number: Tensor, partner: Tensor) -> dict:
        """What the host's reducers take, of losses [N], numbers of positives [N] and sums of their indices [N]."""

    def _check(self) -> None:
        check_call({"temperature": self.temperature})
        distance = self.distance
        known = type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity)
        if not known or distance.p != 2 or distance.power != 1:
            raise ValueError(
                "distance must be CosineSimilarity() or DotProductSimilarity() with p=2 and power=1, whose products "
                f"can be streamed; got {distance}."
            )

    def _row_losses(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Losses [N], numbers of positives [N] and sums of their indices [N]; None for a batch whose loss is 0."""
        if labels is None or ref_labels is None:
            raise ValueError("labels are needed (ref_labels with ref_emb): pairs in indices_tuple alone are not taken.")
        labels = integers("labels", labels, embeddings.shape[0], embeddings.device)
        same_set = ref_emb is embeddings
        ref_labels = integers("ref_labels", ref_labels, ref_emb.shape[0], embeddings.device)
        index = torch.arange(embeddings.shape[0], device=embeddings.device)
        own = index if same_set else None
        number, total = _matches(labels, ref_labels)
        if indices_tuple is not None:
            own = _own_columns(indices_tuple, labels, ref_labels, number, total)
            if same_set and (own is None or not torch.equal(own, index)):
                _refuse()
        if own is not None:
            number, total = number - 1, total - own
        negatives = ref_emb.shape[0] - number - (0 if own is None else 1)
        positive_pairs, negative_pairs = int(number.sum()), int(negatives.sum())
        if 0 in (positive_pairs, negative_pairs) or positive_pairs == negative_pairs == 1:
            return None  # as the host: nothing to tell apart
        unit = self.distance.normalize_embeddings
        with numerics.without_autocast(embeddings):
            z = operand(embeddings, unit, backend="auto")
            columns = z if same_set else operand(ref_emb.to(embeddings.dtype), unit, backend="auto")
            if own is not None and not same_set:
                columns, ref_labels = (rows_first(x, own) for x in (columns, ref_labels))
            rows = self._of_rows(z, labels, columns, ref_labels, own is not None, unit)
        return rows, number, total

    @abstractmethod
    def _of_rows(self, z: Tensor, labels: Tensor, columns: Tensor, ref_labels: Tensor, own: bool, unit: bool) -> Tensor:
        """[N] losses of operands z among `columns`; own: column i is row i itself."""


class SupConLoss(_RowLosses, losses.SupConLoss):
    """`losses.SupConLoss`: "out" over all pairs of equal labels; rows without a positive have loss 0."""

    def __init__(self, temperature: float = 0.1, **kwargs):
        super().__init__(temperature=temperature, **kwargs)
        self._check()

    def _of_rows(self, z: Tensor, labels: Tensor, columns: Tensor, ref_labels: Tensor, own: bool, unit: bool) -> Tensor:
        return out_against(z, labels, columns, ref_labels, 1 / self.temperature, own=own, unit=unit)[0]

    def _reported(self, rows: Tensor, number: Tensor, partner: Tensor) -> dict:
        return {"losses": rows, "indices": torch.arange(len(rows), device=rows.device), "reduction_type": "element"}


class NTXentLoss(_RowLosses, losses.NTXentLoss):
    """`losses.NTXentLoss`: every positive pair alone against the anchor's negatives."""

    def __init__(self, temperature: float = 0.07, **kwargs):
        super().__init__(temperature=temperature, **kwargs)
        self._check()

    def _of_rows(self, z: Tensor, labels: Tensor, columns: Tensor, ref_labels: Tensor, own: bool, unit: bool) -> Tensor:
        among = {
            "v": columns, "row_ids": labels, "ids": ref_labels, "num_images": z.shape[0] if own else 0,
            "scale": 1 / self.temperature, "unit": unit,
        }  # fmt: skip
        return sums_over_positives(z, [among])[0]

    def _reported(self, rows: Tensor, number: Tensor, partner: Tensor) -> dict:
        if (number > 1).any():
            if type(self.reducer) is not reducers.MeanReducer:
                raise ValueError(
                    f"with {int(number.max())} positives of a row NTXentLoss has the mean over all pairs, no loss of "
                    f"every pair for {type(self.reducer).__name__}: use MeanReducer(), or the host's NTXentLoss."
                )
            return {"losses": rows.sum() / number.sum(), "indices": None, "reduction_type": "already_reduced"}
        (anchors,) = (number == 1).nonzero(as_tuple=True)
        pairs = anchors, partner[anchors]
        return {"losses": rows[anchors], "indices": pairs, "reduction_type": "pos_pair"}


def _matches(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N] how many columns have each row's label, and the sum of their indices."""
    ordered = ref_labels.sort(stable=True)
    first = torch.searchsorted(ordered.values, labels)
    last = torch.searchsorted(ordered.values, labels, right=True)
    sums = torch.cat([ordered.indices.new_zeros(1), ordered.indices.cumsum(0)])
    return last - first, sums[last] - sums[first]


def _own_columns(
    indices_tuple: tuple, labels: Tensor, ref_labels: Tensor, number: Tensor, total: Tensor
) -> Tensor | None:
    """[N] the column that each row leaves out of its positives as itself, or None; ValueError for other pairs."""
    if len(indices_tuple) != 4:
        _refuse()
    anchors, positives, others, negatives = (x.to(labels.device) for x in indices_tuple)
    count, rows = ref_labels.shape[0], torch.zeros_like(labels)
    given = rows.scatter_add(0, anchors, torch.ones_like(anchors))
    own = total - rows.scatter_add(0, anchors, positives)
    differing = rows.scatter_add(0, others, torch.ones_like(others))
    their_sum = rows.scatter_add(0, others, negatives)
    left_out = number - given
    everything = count * (count - 1) // 2
    if not torch.equal(differing, count - number) or not torch.equal(their_sum, everything - total):
        _refuse()
    if (left_out == 0).all() and (own == 0).all():
        return None
    inside = (own >= 0) & (own < count)
    if not ((left_out == 1) & inside).all() or not torch.equal(ref_labels[own], labels) or len(own.unique()) < len(own):
        _refuse()
    return own


def _refuse() -> None:
    raise ValueError(
        "indices_tuple must hold all pairs that the labels give, four tensors as CrossBatchMemory makes them, each row "
        "apart from itself: pairs or triplets that a miner chose are no function of labels; use the host's loss for "
        "them, or leave the miner out."
    )
