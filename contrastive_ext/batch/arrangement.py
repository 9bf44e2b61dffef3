"""How a batch becomes anchors, sets of candidate columns and positives: one place for what N is in every layout.

    two_view   anchors [z1; z2], 2B; candidates the same rows (+ queue)                 negatives 2B - 2 + K
    one_way    anchors z1 [B]; candidates z2 [M >= B] (+ queue) (+ explicit negatives)  negatives M - 1 + K
    symmetric  anchors z1 and z2, each against the other                                negatives B - 1 each

With a process group the anchors stay those of this rank, and the candidates (the queue aside) are those of all ranks.

`arrangements` normalises, rounds to the operand dtype and computes the positive logits in float32 (float64). Every
path, streaming or dense, starts from its `Arrangement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from . import distributed
from .columns import ColumnSet
from .request import Request


@dataclass(frozen=True)
class Arrangement:
    """A checked batch: everything a loss needs but the statistics over negatives."""

    anchors: Tensor  # [A, D], the rows of every sweep
    column_sets: tuple[ColumnSet, ...]
    row_negatives: Tensor | None  # [A, n, D], explicit negatives of each anchor alone
    scale: float | Tensor
    pair: tuple[Tensor, Tensor]  # [B, D] each, the vectors of a pair
    pos: Tensor  # [R] logit of the positive
    correction: Tensor  # [R] log-mean-exp of the logits of the debiasing positives; pos unless `positives` is given
    symmetric: bool  # R = 2A: the columns of the one set are anchors too
    operand_dtype: torch.dtype
    anchor_ids: Tensor | None = None

    @property
    def candidates(self) -> int:
        """Negatives every anchor would have if none were cancelled."""
        anchors, count = self.anchors.shape[0], 0
        for columns in self.column_sets:
            count += anchors if columns.v is None else columns.v.shape[0]
            count -= anchors // columns.num_images if columns.num_images else 0
        return count + (0 if self.row_negatives is None else self.row_negatives.shape[1])

    def rounding(self) -> Tensor:
        """[R] how far the positive's logit may lie from an equal one by rounding."""
        return numerics.rounding_of_logits(self.scale, *self.pair).repeat(self.pos.shape[0] // self.pair[0].shape[0])


def arrangements(request: Request, scale: float | Tensor) -> tuple[Arrangement, ...]:
    """A checked request as one arrangement, or with a group and layout="symmetric" one per direction.

    There the columns of other ranks are no anchors here.
    """
    group = distributed.agree(request.group)  # the checks are done
    if group is None or request.layout != "symmetric":
        return (_arranged(request, scale, group),)
    forward = replace(request, layout="one_way")
    return _arranged(forward, scale, group), _arranged(forward.swapped(), scale, group)


def _arranged(request: Request, scale: float | Tensor, group: dist.ProcessGroup | None) -> Arrangement:
    z1, z2, layout, ids = request.z1, request.z2, request.layout, request.ids
    batch, two_view, operand_dtype = z1.shape[0], layout == "two_view", request.operands
    operand = partial(numerics.operand, unit=request.normalize, dtype=operand_dtype)
    if two_view:
        anchors = operand(torch.cat([z1, z2]))
        u1, u2 = anchors[:batch], anchors[batch:]
        ids = ids if ids is None else torch.cat([ids, ids])
    else:
        anchors = u1 = operand(z1)
        u2 = operand(z2)

    def of_all_ranks(own: ColumnSet) -> ColumnSet:
        return own if group is None else _gathered(own, anchors, operand_dtype, group)

    column_sets, row_negatives, queue, gate, queue_gate = [], None, request.queue, None, None
    if request.guide is not None:
        gate, queue_gate = request.guide.gates(
            two_view, layout != "one_way", numerics.stats_dtype(z1.dtype), None if queue is None else queue.guide
        )
    if request.in_batch_negatives:
        own = ColumnSet(None if two_view else u2, num_images=batch, ids=ids, gate=gate, unit=request.normalize)
        column_sets.append(of_all_ranks(own))
    if queue is not None:
        older = queue.as_set(operand_dtype, queue_gate)
        column_sets.append(older)
    if request.negatives is not None and request.negatives.dim() == 2:
        column_sets.append(of_all_ranks(ColumnSet(operand(request.negatives), unit=request.normalize)))
    elif request.negatives is not None:
        row_negatives = operand(request.negatives)

    views = 1 if layout == "one_way" else 2
    pos = scale * (u1 * u2[:batch]).sum(-1)
    pos = torch.cat([pos] * views) if views > 1 else pos
    if queue is not None:
        pos = numerics.spoil(pos, older.keys)
    correction = pos
    if request.positives is not None:
        by_view = torch.stack([u1, u2][:views])
        logits = scale * numerics.product(by_view.transpose(0, 1), operand(request.positives).permute(1, 2, 0))
        correction = logits.logsumexp(2).T.flatten() - math.log(request.positives.shape[0])
    return Arrangement(
        anchors=anchors,
        column_sets=tuple(column_sets),
        row_negatives=row_negatives,
        scale=scale,
        pair=(u1, u2[:batch]),
        pos=pos,
        correction=correction,
        symmetric=layout == "symmetric",
        operand_dtype=operand_dtype,
        anchor_ids=None if ids is None else ids[: anchors.shape[0]],
    )


def _gathered(own: ColumnSet, anchors: Tensor, operand_dtype: torch.dtype, group: dist.ProcessGroup) -> ColumnSet:
    """The columns of every rank, in rank order; this rank's own begin at positive_offset."""
    v = anchors if own.v is None else own.v
    return replace(
        own,
        v=distributed.gather(v, group, operand_dtype),
        positive_offset=dist.get_rank(group) * len(v) if own.num_images else 0,
        ids=None if own.ids is None else distributed.gather(own.ids, group),
        gate=own.gate and replace(own.gate, features=distributed.gather(own.gate.features, group), col_limit=None),
    )
