"""InfoNCE of labelled rows: every positive of an anchor stands alone against the negatives of the anchor.

    L_ip = softplus(lse_i - s_ip)      p of the label of i, lse_i over the columns of other labels

A positive has no other positive in its denominator, as it has in SupCon. Two sweeps: lse_i, then the sum over
positives with lse_i as offset, through which the gradient of the negatives flows. `NTXentLoss` of
pytorch-metric-learning; with one positive a row it is InfoNCE (Sohn 2016; Chen et al., arXiv:2002.05709).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.columns import Columns
from ..batch.queue import NegativeQueue
from ..batch.ring import Ring
from ..batch.ring_stats import stats_of_all
from ..batch.ring_sums import sums_of_all
from ..numerics import logsumexp_pair, softplus
from ..operators.unit_rows import operand
from ..problem.pairs import UNFILLED
from .overloads import returns_stats
from .stats import Record
from .supcon import DEFAULT_TEMPERATURE, check_labelled, labelled_keys


@dataclass(frozen=True)
class LabelledStats(Record):
    """What the labels gave; 0-d tensors on the device of the inputs.

    positives     mean number of positives of a row
    skipped_rows  rows without a positive, which add no pair
    """

    positives: Tensor
    skipped_rows: Tensor


@returns_stats
@distributed.across_ranks
def fused_labelled_infonce_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    queue: NegativeQueue | Columns | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, LabelledStats]:
    """InfoNCE over every (anchor, positive) of labelled rows [N, D] or views [V, B, D], without an N x N matrix.

    L_ip = -log e^{s_ip} / (e^{s_ip} + sum_{j of another label} e^{s_ij})

    features     [N, D], or [V, B, D] V views of B images (other libraries take [B, V, D]), fp16/bf16/fp32/fp64
    labels       [N], or [B], integers > -2^63 + 2
    temperature  > 0, or a 0-d tensor to learn it; default 0.1
    logit_scale  1/temperature instead
    queue        labelled columns beside the rows, as in `fused_supcon_loss`
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean" over all pairs, "sum" over them, or "none": [N] ([V, B]), the sum over every row's positives
    return_stats also return a `LabelledStats`
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: columns of all its ranks.
                 "mean" divides by the average over ranks of the number of pairs: the ranks' means average to that of
                 the whole batch, in value and gradient
    Returns      float32 (float64 for float64 inputs), nats; 0 for a row without a positive or without a negative
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O((N + K) D); time O(N (N + K) D), four sweeps; once differentiable
    Paper        Sohn, NeurIPS 2016; pytorch-metric-learning's NTXentLoss
    """
    call = Call(
        temperature=temperature, logit_scale=logit_scale, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize,
        reduction=reduction, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    labels = check_labelled(features, labels)
    keys = labelled_keys(queue, features, normalize)
    with numerics.without_autocast(features):
        scale = call.scale(features)
        ranks = call.agree(group, features)
        z = operand(features, normalize, backend=backend).flatten(0, -2)
        row_labels = labels.repeat(z.shape[0] // labels.shape[0])
        columns, column_labels, own, ring = z, row_labels, slice(0, z.shape[0]), None
        if ranks is not None:
            everyone = ranks.rows(z)
            if ranks.exchange == "ring":
                ring = Ring(everyone, features.dtype, z.device)
            else:
                columns, column_labels = everyone.gather(z, features.dtype), everyone.gather(row_labels)
                own = everyone.own
        held = None if keys is None else keys.as_set(features.dtype)
        if call.is_dense:
            if held is not None and held.ids is not None:
                columns, column_labels = torch.cat([columns, held.keys]), torch.cat([column_labels, held.ids])
            losses, number = _dense(scale * numerics.product(z, columns.T), column_labels, own)
        else:
            how: dict[str, Any] = {
                "row_ids": row_labels,
                "scale": scale,
                "operand_dtype": features.dtype,
                "backend": backend,
            }
            sets: list[dict[str, Any]] = [{
                "v": columns, "ids": column_labels, "num_images": z.shape[0], "positive_offset": own.start,
                "unit": normalize, "ring": ring, **how,
            }]  # fmt: skip
            if held is not None and held.ids is not None:
                # a queue may be overwritten before the backward, which recomputes
                sets.append({"v": held.keys.clone(), "ids": held.ids.clone(), "unit": False, **how})
            losses, number = sums_over_positives(z, sets)
        losses = losses + 0.0 * z.sum(1)  # NaN where the row holds one
        if held is not None:
            losses = numerics.spoil(losses, held.keys)
        loss = call.reduce_counted(losses.view(features.shape[:-1]), number.sum(), ranks)
    if not return_stats:
        return loss
    return loss, LabelledStats(number.mean(), (number == 0).sum())


def sums_over_positives(z: Tensor, sets: list[dict]) -> tuple[Tensor, Tensor]:
    """[N] sum over the positives of every row of softplus(lse_i - s_ip), and how many they are.

    sets   arguments of `stats_of_all` for each set of columns, labels as ids
    """
    how = [columns | {"v": None} if columns["v"] is z else columns for columns in sets]  # one set: half the work
    lse = reduce(logsumexp_pair, (stats_of_all(z, **columns).lse[0] for columns in how))
    plain = [{name: x for name, x in columns.items() if name != "unit"} for columns in sets]
    parts = [sums_of_all(z, **columns, offset=lse, sign=-1, only_equal_ids=True) for columns in plain]
    return torch.stack([p.sum for p in parts]).sum(0), torch.stack([p.number for p in parts]).sum(0)


def _dense(logits: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The same from the whole matrix."""
    index = torch.arange(labels.shape[0], device=labels.device)
    equal = labels[rows, None] == labels
    positive, negative = equal & (index[rows, None] != index), ~equal & (labels != UNFILLED)
    some = negative.any(1)
    stand_in = negative | ~some[:, None]
    lse = logits.masked_fill(~stand_in, -torch.inf).logsumexp(1)
    chosen = positive & some[:, None]
    gap = (lse[:, None] - logits).masked_fill(~chosen, 0.0)
    return softplus(gap).where(chosen, 0.0).sum(1), positive.sum(1).to(logits.dtype)
