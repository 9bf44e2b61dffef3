"""The statistics of an arranged batch: which operator a loss wants, one sweep per set of candidates, merged.

Losses of log-sum-exps sweep every set of columns by itself. Ranks do not merge: a loss of ranks has all candidates of
an anchor in one set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..batch.arrangement import Arrangement
from ..batch.columns import ColumnSet, OwnColumns
from ..batch.ring_ranked import RankedColumns, ring_ranked_stats
from ..batch.ring_stats import stats_of_all
from ..operators.ranked_stats import ranked_stats
from ..operators.row_stats import union
from ..problem.pairs import NO_COLUMN_ID, Gate
from ..problem.ranking import Ranking
from .prior import prior_of_rows
from .row_loss import RowLoss, RowStatistics
from .stats import Diagnostics

_Swept = tuple[RowStatistics, Diagnostics | None]


def sweep(row_loss: RowLoss, batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    """What `from_stats` sees, and with `diagnostics` what `LossStats` is made of."""
    if row_loss.ranking is None:
        return _sums(row_loss, batch, diagnostics, backend)
    return _ranked_sums(row_loss.ranking, batch, diagnostics, backend)


def _statistics(batch: Arrangement, lse: tuple[Tensor, ...], count: Tensor) -> RowStatistics:
    return RowStatistics(lse, batch.pos, batch.correction, count, batch.row_scale, batch.positive_terms)


def _sums(row_loss: RowLoss, batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    parts = []
    for columns in batch.column_sets:
        scale, share = _hardened(batch.scale, row_loss.hardness_of(False) if columns.of_documents else 0.0)
        swept = partial(_over_columns, batch, columns, row_loss.exponents, diagnostics, backend)
        if columns.log_weight is None:
            parts.append(_softened(swept(scale), share))
            continue
        lse, aux = _softened(swept(scale, columns.log_weight), share)
        if diagnostics:  # similarities are those without the weights
            with torch.no_grad():
                plain = swept(batch.scale)[1]
            aux = torch.stack([aux[0], plain[1], plain[2], aux[3]])
        parts.append((lse, aux))
    if batch.own is not None:
        scale, share = _hardened(batch.scale, row_loss.hardness_of(True))
        parts.append(_softened(_own_sums(batch.anchors, batch.own, scale, row_loss.exponents, diagnostics), share))
    lse, aux = reduce(union, parts)
    stats = _statistics(batch, lse.unbind(0) if len(lse) > 1 else (lse.squeeze(0),), aux[0])
    if not diagnostics:
        return stats, None
    negatives, largest, total, lse_squared = aux.unbind(0)
    return stats, Diagnostics(negatives, largest, total, lse_squared, batch.candidates)


def _over_columns(
    batch: Arrangement,
    columns: ColumnSet,
    exponents: tuple[float, ...],
    diagnostics: bool,
    backend: str,
    scale: float | Tensor,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Statistics over one set of columns, of rows and where columns are anchors too of columns."""
    u, v, unit = batch.anchors if columns.rows is None else columns.rows, columns.v, columns.unit
    if log_weight is not None:
        u, v = _with_weights(u, columns.keys, scale, log_weight, batch.operand_dtype)
        unit = False
    options: dict[str, Any] = {
        "scale": scale, "exponents": exponents, "num_images": columns.num_images,
        "positive_offset": columns.positive_offset, "row_ids": batch.anchor_ids, "ignored": columns.ignored,
        "gate": columns.gate, "unit": unit, "operand_dtype": batch.operand_dtype, "diagnostics": diagnostics,
        "backend": backend,
    }  # fmt: skip
    swept = stats_of_all(u, v, ids=columns.ids, ring=columns.ring, columns=batch.symmetric, **options)
    if not batch.symmetric:
        return swept.lse, swept.aux
    return torch.cat([swept.lse, swept.col_lse], 1), torch.cat([swept.aux, swept.col_aux], 1)


def _with_weights(
    u: Tensor, v: Tensor, scale: float | Tensor, log_weight: Tensor, dtype: torch.dtype | str
) -> tuple[Tensor, Tensor]:
    """Rows and columns whose scaled products are s + w: a feature that is 1 in every row and w/scale in the column.

    It is as many features as it takes to hold float32 in numbers of the operand dtype. Their 1 is one of the scale's,
    d(1)/d(scale) = -1/scale, so that a learned scale gets the gradient of s alone.
    """
    known = scale.detach() if isinstance(scale, Tensor) else scale
    rest = log_weight.detach().to(v.dtype) / known
    held = []
    for _ in range(_PARTS.get(dtype, 1)):
        held.append(rest if isinstance(dtype, str) else numerics.round_operand(rest, dtype))
        rest = rest - held[-1]
    one = known / scale * torch.ones_like(u[:, :1])
    return torch.cat([u, one.expand(-1, len(held))], 1), torch.cat([v, torch.stack(held, 1)], 1)


_PARTS: dict[torch.dtype | str, int] = {torch.bfloat16: 3, torch.float16: 3}


def _hardened(scale: float | Tensor, hardness: float) -> tuple[float | Tensor, float | Tensor]:
    """The scale of a sweep whose logits carry hardness times the cosine, and the share of it that has a gradient."""
    if hardness == 0:
        return scale, 1.0
    if not isinstance(scale, Tensor):
        return scale + hardness, scale / (scale + hardness)
    known = scale.detach()
    share = known / (known + hardness)
    return (scale - known) / share + (known + hardness), share


def _softened(swept: tuple[Tensor, Tensor], share: float | Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of a sweep at the hardened scale: gradients of the learned part, similarities as they are."""
    if not isinstance(share, Tensor) and share == 1.0:
        return swept
    lse, aux = swept
    fixed = lse.detach()
    lse = fixed + (lse - fixed).masked_fill(fixed == -torch.inf, 0.0) * share
    if len(aux) > 1:
        aux = torch.stack([aux[0], aux[1] * share, aux[2] * share, aux[3]])
    return lse, aux


def _own_sums(
    anchors: Tensor, own: OwnColumns, scale: float | Tensor, exponents: tuple[float, ...], diagnostics: bool
) -> tuple[Tensor, Tensor]:
    """Statistics over each anchor's own candidates: [A, n] logits, no more memory than the candidates."""
    logits = scale * numerics.own_products(anchors, own.v)
    count = logits.new_full(logits.shape[:1], logits.shape[1])
    if own.kept is not None:
        count = own.kept.sum(1).to(logits.dtype)
    weighted = logits if own.log_weight is None else logits + own.log_weight.to(logits.dtype)
    lse = torch.stack([_log_sum(beta * weighted, own.kept) for beta in exponents])
    if not diagnostics:
        return lse, count[None]
    fixed = logits.detach()
    total = (fixed if own.kept is None else fixed.where(own.kept, 0.0)).sum(1)
    largest = (fixed if own.kept is None else fixed.where(own.kept, -torch.inf)).amax(1)
    squared = _log_sum(2 * exponents[0] * weighted.detach(), own.kept)
    return lse, torch.stack([count, largest, total, squared])


def _log_sum(x: Tensor, kept: Tensor | None) -> Tensor:
    """[A] log sum of e^x [A, n] over what is kept; -inf, without a gradient, where nothing is."""
    if kept is None:
        return x.logsumexp(1)
    empty = ~kept.any(1)
    return x.masked_fill(~(kept | empty[:, None]), -torch.inf).logsumexp(1).masked_fill(empty, -torch.inf)


def _ranked_sums(ranking: Callable[[int], Ranking], batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    """One call over all candidates of an anchor; with layout="symmetric" one per direction."""
    if any(columns.ring is not None for columns in batch.column_sets):
        lse, aux = _ranked_around(ranking, batch, diagnostics, backend)
        return _ranked_results(batch, lse, aux, diagnostics)
    columns = _one_set_of_columns(batch)
    v, gate = columns.v, columns.gate
    sides = [(batch.anchors, v, batch.anchor_ids, None if v is None else columns.ids, gate)]
    if batch.symmetric and v is not None:
        reverse = None
        if gate is not None and gate.col_limit is not None:
            reverse = Gate(gate.features[None], gate.scorers[0], gate.col_limit)
        sides.append((v, batch.anchors, columns.ids, batch.anchor_ids, reverse))
    anchors = batch.anchors.shape[0]
    swept = [
        ranked_stats(
            u, v, ranking=_of_side(ranking((u if v is None else v).shape[0]), batch.pos, side * anchors, anchors),
            scale=batch.scale,
            num_images=columns.num_images, positive_offset=columns.positive_offset, row_ids=row_ids,
            col_ids=col_ids, ignored=columns.ignored, gate=gate, diagnostics=diagnostics, unit=columns.unit,
            operand_dtype=batch.operand_dtype, backend=backend,
        )
        for side, (u, v, row_ids, col_ids, gate) in enumerate(sides)
    ]  # fmt: skip
    lse, aux = torch.cat([s.lse for s in swept]), torch.cat([s.aux for s in swept], 1)
    return _ranked_results(batch, lse, aux, diagnostics)


def _ranked_results(batch: Arrangement, lse: Tensor, aux: Tensor, diagnostics: bool) -> _Swept:
    """What a loss of ranks sees, and of the diagnostics the weights too."""
    stats = _statistics(batch, (lse,), aux[0])
    if not diagnostics:
        return stats, None
    count, largest, total, lse_squared, weights, max_weight = aux.unbind(0)
    mean_weight = weights / count.clamp(min=1)
    return stats, Diagnostics(count, largest, total, lse_squared, batch.candidates, mean_weight, max_weight)


def _of_side(ranking: Ranking, pos: Tensor, first: int, number: int) -> Ranking:
    """With the priors of `number` rows from `first` on, where there is one for every pair or row."""
    priors = prior_of_rows(ranking.tau_plus, pos)
    return replace(ranking, tau_plus=priors).of_rows(slice(first, first + number))


def _ranked_around(
    ranking: Callable[[int], Ranking], batch: Arrangement, diagnostics: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The same where columns of other ranks come round: sets stay apart and make every turn together."""
    sets = []
    for s in batch.column_sets:
        v, ids = s.v, s.ids
        if s.ring is None and v is not None and not v.requires_grad:  # as in `_one_set_of_columns`
            v, ids = v.clone(), None if ids is None else ids.clone()
        names = ("num_images", "positive_offset", "ignored", "gate", "unit")
        sets.append(RankedColumns(s.ring, v, ids, {name: getattr(s, name) for name in names}))
    of_rows = _of_side(ranking(batch.candidates), batch.pos, 0, batch.anchors.shape[0])
    return ring_ranked_stats(
        batch.anchors, sets, ranking=of_rows, diagnostics=diagnostics, scale=batch.scale,
        row_ids=batch.anchor_ids, operand_dtype=batch.operand_dtype, backend=backend,
    )  # fmt: skip


def _one_set_of_columns(batch: Arrangement) -> ColumnSet:
    """All candidates of an anchor as one set: ranks do not merge. Only the first set has lists, which so stay right."""
    if len(batch.column_sets) == 1:
        (columns,) = batch.column_sets
        if columns.v is None or columns.v.requires_grad:
            return columns
        # a queue may be overwritten before the backward, which recomputes
        return replace(columns, v=columns.v.clone(), ids=None if columns.ids is None else columns.ids.clone())
    vectors = [batch.anchors if s.v is None else s.v for s in batch.column_sets]
    ids = None
    if any(s.ids is not None for s in batch.column_sets):
        ids = torch.cat(
            [
                torch.full(v.shape[:1], NO_COLUMN_ID, dtype=torch.int64, device=v.device) if s.ids is None else s.ids
                for s, v in zip(batch.column_sets, vectors, strict=True)
            ]
        )
    gates = [s.gate for s in batch.column_sets if s.gate is not None]
    gate = None
    if gates:
        assert len(gates) == len(batch.column_sets)  # the loss and the request have checked it
        gate = Gate(gates[0].scorers, torch.cat([g.features for g in gates]), gates[0].row_limit)
    unit = all(s.unit for s in batch.column_sets)
    return replace(batch.column_sets[0], v=torch.cat(vectors), ids=ids, gate=gate, unit=unit)
