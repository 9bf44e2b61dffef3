"""How a batch becomes anchors, sets of candidate columns and positives: one place for what N is in every layout.

    two_view     anchors [z1; z2], 2B; candidates the same rows (+ queue)                 negatives 2B - 2 + K
    one_way      anchors z1 [B]; candidates z2 [M >= B] (+ queue) (+ explicit negatives)  negatives M - 1 + K
    symmetric    anchors z1 and z2, each against the other                                negatives B - 1 each
    (q2d, ...)   anchors z1 [B]; one_way, and in the same sum of row i
                 q2q  z1_i against z1      d2q  z2_i against z1      d2d  z2_i against z2   own rows left out

With a process group the anchors stay those of this rank, and the candidates (the queue aside) are those of all ranks.

`arrangements` normalises, rounds to the operand dtype and computes the positive logits in float32 (float64). Every
path, streaming or dense, starts from its `Arrangement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import numerics
from ..operators import unit_rows
from ..problem.pairs import Gate
from .cancellation import Judgement
from .columns import Columns, ColumnSet, OwnColumns
from .distributed import Ranks
from .request import Request
from .ring import Ring


@dataclass(frozen=True)
class Arrangement:
    """A checked batch: everything a loss needs but the statistics over negatives."""

    anchors: Tensor  # [A, D], the rows of every sweep that has no own
    column_sets: tuple[ColumnSet, ...]
    own: OwnColumns | None  # explicit negatives of each anchor alone
    scale: float | Tensor  # of every sweep
    row_scale: float | Tensor  # 1/temperature as formulas see it: [R] where the rows carry it, otherwise `scale`
    pair: tuple[Tensor, Tensor]  # [B, D] each, the vectors of a pair
    pos: Tensor  # [R] logit of the positive
    correction: Tensor  # [R] log-mean-exp of the logits of the debiasing positives; pos unless `positives` is given
    symmetric: bool  # R = 2A: the columns of the one set are anchors too
    operand_dtype: torch.dtype | str  # or one of numerics.SPLIT_PRODUCTS
    anchor_ids: Tensor | None = None
    positive_terms: int = 1  # how often e^pos stands in the sum of a row

    @property
    def candidates(self) -> int:
        """Negatives every anchor would have if none were cancelled."""
        anchors, count = self.anchors.shape[0], 0
        for columns in self.column_sets:
            count += anchors if columns.v is None else columns.v.shape[0]
            count += 0 if columns.ring is None else columns.ring.others
            count -= anchors // columns.num_images if columns.num_images else 0
            count -= 0 if columns.ignored is None else columns.ignored.shape[1]
        return count + (0 if self.own is None else self.own.v.shape[1])

    def rounding(self) -> Tensor:
        """[R] how far the positive's logit may lie from an equal one by rounding."""
        return numerics.rounding_of_logits(self.scale, *self.pair).repeat(self.pos.shape[0] // self.pair[0].shape[0])


def arrangements(request: Request, scale: float | Tensor, ranks: Ranks | None) -> tuple[Arrangement, ...]:
    """A checked request as one arrangement, or a symmetric one as two where its columns are more than its anchors.

    They are with a group, with columns of z2 beyond the pairs, and with explicit negatives.
    """
    more = request.z2.shape[0] > request.z1.shape[0] or request.negatives is not None
    if request.layout == "symmetric" and (more or ranks is not None):
        forward, backward = request.one_way_parts
        return _arranged(forward, scale, ranks), _arranged(backward, scale, ranks)
    return (_arranged(request, scale, ranks),)


def _arranged(request: Request, scale: float | Tensor, ranks: Ranks | None) -> Arrangement:
    batch, two_view, operand_dtype = request.z1.shape[0], request.layout == "two_view", request.operands
    operand = partial(unit_rows.operand, unit=request.normalize, dtype=operand_dtype, backend=request.backend)
    row_scale = scale
    if two_view:
        anchors = operand(torch.cat([request.z1, request.z2]))
        u1, u2 = anchors.split((batch, batch))  # two slices would each fill a matrix with zeros in the backward
    else:
        u1, u2 = operand(request.z1), operand(request.z2)
        if isinstance(scale, Tensor) and scale.dim() == 1:  # rows carry it: rounded once, and no longer of unit length
            rows = operand(request.z1, dtype=numerics.stats_dtype(operand_dtype))
            u1, scale = numerics.round_operand(rows * scale[:, None], operand_dtype), 1.0
        anchors = u1
    index = request.positive_index
    if index is None:
        partners = u2 if two_view else u2[:batch]
    else:
        partners = numerics.take_rows(u2, index)
    judged = None if request.guide is None else request.guide.judge(u1, u2, index)
    ids = request.ids
    unit = request.normalize and row_scale is scale

    column_sets = []
    if request.in_batch_negatives:
        for own in _own_columns(request, u1, u2, judged, unit):
            column_sets.append(own if ranks is None else _of_all(own, anchors, operand_dtype, ranks))
    if request.queue is not None:
        keys = request.queue.constant(operand_dtype)
        gate = _gate(request, judged, keys, request.queue, two_view)
        column_sets.append(ColumnSet(keys, ids=request.queue.held_ids, gate=gate, log_weight=request.queue.log_weight))
    further = None
    if request.negatives is not None:
        v = operand(request.negatives.data)
        if v.dim() == 3:
            kept = _kept(request, judged, v, request.negatives)
            further = OwnColumns(v, kept, request.negatives.log_weight)
        else:
            gate = _gate(request, judged, v, request.negatives, two_view)
            log_weight = request.negatives.log_weight
            shared = ColumnSet(v, ids=request.negatives.ids, gate=gate, unit=unit, log_weight=log_weight)
            column_sets.append(shared if ranks is None else _of_all(shared, anchors, operand_dtype, ranks))

    views = 2 if two_view or request.layout == "symmetric" else 1
    pos = scale * (u1 * partners).sum(-1)
    pos = torch.cat([pos] * views) if views > 1 else pos
    if request.queue is not None:
        pos = numerics.spoil(pos, keys)
    correction = pos
    if request.positives is not None:
        by_view = torch.stack([u1, u2][:views]) if views > 1 else u1[None]
        logits = scale * numerics.product(by_view.transpose(0, 1), operand(request.positives).permute(1, 2, 0))
        correction = logits.logsumexp(2).T.flatten() - math.log(request.positives.shape[0])
    if ids is not None:
        ids = ids[:batch] if index is None else ids[index]
    return Arrangement(
        anchors=anchors,
        column_sets=tuple(column_sets),
        own=further,
        scale=scale,
        row_scale=row_scale,
        pair=(u1, partners),
        pos=pos,
        correction=correction,
        symmetric=request.layout == "symmetric",
        operand_dtype=request.products,
        anchor_ids=ids if ids is None or not two_view else torch.cat([ids, ids]),
        positive_terms=1 + ("d2q" in request.directions),
    )


def _own_columns(request: Request, u1: Tensor, u2: Tensor, judged: Judgement | None, unit: bool) -> list[ColumnSet]:
    """The sets of columns that the batch itself brings."""
    batch, ids, index = request.z1.shape[0], request.ids, request.positive_index

    def columns(v: Tensor | None, g: tuple[Tensor, Tensor] | None, ids: Tensor | None, **more) -> ColumnSet:
        both_ways = v is None or request.layout == "symmetric"
        gate = None
        if judged is not None and g is not None:
            gate = judged.gate(*g)
            gate = replace(gate, col_limit=gate.row_limit) if both_ways else gate
        return ColumnSet(v, num_images=batch, ids=ids, gate=gate, unit=unit, **more)

    g1, g2 = (None, None) if judged is None else (judged.g1, judged.g2)
    if request.layout == "two_view":
        g = None if g1 is None or g2 is None else (torch.cat([g1, g2]),) * 2
        return [columns(None, g, None if ids is None else torch.cat([ids, ids]))]
    pair_ids = None if ids is None else ids[:batch]
    with_documents = columns(u2, _both(g1, g2), ids)
    if index is not None:
        with_documents = replace(with_documents, num_images=0, ignored=index[:, None])
    sets = [with_documents]
    own_documents = None if g2 is None else g2[:batch]
    for direction in request.directions:
        if direction == "q2q":
            sets.append(columns(None, _both(g1, g1), pair_ids, of_documents=False))
        elif direction == "d2q":
            sets.append(columns(u1, _both(own_documents, g1), pair_ids, rows=u2[:batch], of_documents=False))
        elif direction == "d2d":
            v = None if u2.shape[0] == batch else u2
            sets.append(columns(v, _both(own_documents, g2), ids, rows=u2[:batch], of_documents=False))
    return sets


def _both(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if a is None or b is None else (a, b)


def _gate(request: Request, judged: Judgement | None, v: Tensor, columns: Columns, two_view: bool) -> Gate | None:
    """The gate of further columns v, where the guide knows anything of them."""
    g = None if judged is None or request.guide is None else request.guide.features(v, columns.guide)
    if judged is None or g is None:
        return None
    return judged.gate(torch.cat([judged.g1, judged.g2]) if two_view else judged.g1, g)


def _kept(request: Request, judged: Judgement | None, v: Tensor, columns: Columns) -> Tensor | None:
    """[B, n] which of every anchor's own columns are not cancelled."""
    kept = None
    if columns.ids is not None and request.ids is not None:
        ids = request.ids[: v.shape[0]] if request.positive_index is None else request.ids[request.positive_index]
        kept = columns.ids != ids[:, None]
    g = None if judged is None or request.guide is None else request.guide.features(v, columns.guide)
    if judged is not None and g is not None:
        below = ~((judged.g1[:, None] * g).sum(2) > judged.limit[:, None])
        kept = below if kept is None else kept & below
    return kept


def _of_all(own: ColumnSet, anchors: Tensor, operand_dtype: torch.dtype, ranks: Ranks) -> ColumnSet:
    """The columns of every rank: this rank's and a ring, or all in rank order, own ones from positive_offset on."""
    rows = anchors if own.rows is None else own.rows
    v = rows if own.v is None else own.v
    everyone = ranks.rows(v)
    if ranks.exchange == "ring":
        return replace(own, ring=Ring(everyone, operand_dtype, v.device))
    before = everyone.own.start
    return replace(
        own,
        v=everyone.gather(v, operand_dtype),
        positive_offset=before if own.num_images else 0,
        ignored=None if own.ignored is None else own.ignored + before,
        ids=None if own.ids is None else everyone.gather(own.ids),
        log_weight=None if own.log_weight is None else everyone.gather(own.log_weight),
        gate=own.gate and replace(own.gate, features=everyone.gather(own.gate.features), col_limit=None),
    )
