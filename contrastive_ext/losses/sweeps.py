"""The statistics of an arranged batch: which operator a loss wants, one sweep per set of candidates, merged.

Losses of log-sum-exps sweep every set of columns by itself. Ranks do not merge: a loss of ranks has all candidates of
an anchor in one set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..batch.arrangement import Arrangement
from ..batch.columns import ColumnSet
from ..numerics import logsumexp_pair, own_products
from ..operators.ranked_stats import ranked_stats
from ..operators.row_stats import row_stats
from ..problem.pairs import NO_COLUMN_ID, Gate
from ..problem.problem import Statistics
from ..problem.ranking import Ranking
from .row_loss import RowLoss, RowStatistics
from .stats import Diagnostics

_Swept = tuple[RowStatistics, Diagnostics | None]


def sweep(row_loss: RowLoss, batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    """What `from_stats` sees, and with `diagnostics` what `LossStats` is made of."""
    if row_loss.ranking is None:
        return _sums(row_loss.exponents, batch, diagnostics, backend)
    return _ranked_sums(row_loss.ranking, batch, diagnostics, backend)


def _sums(exponents: tuple[float, ...], batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    parts = []
    for columns in batch.column_sets:
        swept = row_stats(
            batch.anchors, columns.v, scale=batch.scale, exponents=exponents, num_images=columns.num_images,
            positive_offset=columns.positive_offset, row_ids=batch.anchor_ids,
            col_ids=None if columns.v is None else columns.ids, gate=columns.gate, unit=columns.unit,
            operand_dtype=batch.operand_dtype, columns=batch.symmetric, diagnostics=diagnostics, backend=backend,
        )  # fmt: skip
        parts.append(_both_sides(swept, batch.symmetric))
    if batch.row_negatives is not None:
        parts.append(_own_negatives(batch, exponents, diagnostics))
    lse, aux = reduce(_merge, parts)
    stats = RowStatistics(tuple(lse.unbind(0)), batch.pos, batch.correction, aux[0], batch.scale)
    if not diagnostics:
        return stats, None
    negatives, largest, total, lse_squared = aux.unbind(0)
    return stats, Diagnostics(negatives, largest, total, lse_squared, batch.candidates)


def _both_sides(swept: Statistics, symmetric: bool) -> tuple[Tensor, Tensor]:
    if not symmetric:
        return swept.lse, swept.aux
    return torch.cat([swept.lse, swept.col_lse], 1), torch.cat([swept.aux, swept.col_aux], 1)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics over the union of two disjoint sets of columns."""
    (lse, aux), (more, more_aux) = one, other
    merged = aux + more_aux  # count, and with diagnostics the total
    if len(aux) > 1:
        largest = torch.maximum(aux[1], more_aux[1])
        merged = torch.stack([merged[0], largest, merged[2], logsumexp_pair(aux[3], more_aux[3])])
    return logsumexp_pair(lse, more), merged


def _own_negatives(batch: Arrangement, exponents: tuple[float, ...], diagnostics: bool) -> tuple[Tensor, Tensor]:
    """Statistics over each anchor's own explicit negatives: [A, n] logits, no more memory than the negatives."""
    assert batch.row_negatives is not None
    logits = batch.scale * own_products(batch.anchors, batch.row_negatives)
    lse = torch.stack([(beta * logits).logsumexp(1) for beta in exponents])
    count = logits.new_full(logits.shape[:1], logits.shape[1])
    if not diagnostics:
        return lse, count[None]
    fixed = logits.detach()
    return lse, torch.stack([count, fixed.amax(1), fixed.sum(1), (2 * exponents[0] * fixed).logsumexp(1)])


def _ranked_sums(ranking: Callable[[int], Ranking], batch: Arrangement, diagnostics: bool, backend: str) -> _Swept:
    """One call over all candidates of an anchor; with layout="symmetric" one per direction."""
    _refuse_own_negatives(batch)
    columns = _one_set_of_columns(batch)
    v, gate = columns.v, columns.gate
    sides = [(batch.anchors, v, batch.anchor_ids, None if v is None else columns.ids, gate)]
    if batch.symmetric and v is not None:
        reverse = None
        if gate is not None and gate.col_limit is not None:
            reverse = Gate(gate.features[None], gate.scorers[0], gate.col_limit)
        sides.append((v, batch.anchors, columns.ids, batch.anchor_ids, reverse))
    swept = [
        ranked_stats(
            u, v, ranking=ranking((u if v is None else v).shape[0]), scale=batch.scale,
            num_images=columns.num_images, positive_offset=columns.positive_offset, row_ids=row_ids,
            col_ids=col_ids, gate=gate, diagnostics=diagnostics, unit=columns.unit,
            operand_dtype=batch.operand_dtype, backend=backend,
        )
        for u, v, row_ids, col_ids, gate in sides
    ]  # fmt: skip
    lse, aux = torch.cat([s.lse for s in swept]), torch.cat([s.aux for s in swept], 1)
    stats = RowStatistics((lse,), batch.pos, batch.correction, aux[0], batch.scale)
    if not diagnostics:
        return stats, None
    count, largest, total, lse_squared, weights, max_weight = aux.unbind(0)
    mean_weight = weights / count.clamp(min=1)
    return stats, Diagnostics(count, largest, total, lse_squared, batch.candidates, mean_weight, max_weight)


def _one_set_of_columns(batch: Arrangement) -> ColumnSet:
    """All candidates of an anchor as one set: ranks do not merge."""
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
        if len(gates) < len(batch.column_sets):
            raise ValueError("the Bayesian loss takes a guide or explicit negatives, not both: it ranks them together.")
        gate = Gate(gates[0].scorers, torch.cat([g.features for g in gates]), gates[0].row_limit)
    unit = all(s.unit for s in batch.column_sets)
    return replace(batch.column_sets[0], v=torch.cat(vectors), ids=ids, gate=gate, unit=unit)


def _refuse_own_negatives(batch: Arrangement) -> None:
    if batch.row_negatives is not None:
        raise ValueError(
            "the Bayesian loss ranks an anchor's candidates among those of all anchors: negatives must be [K, D], "
            f"the same for every anchor; got {list(batch.row_negatives.shape)}."
        )
