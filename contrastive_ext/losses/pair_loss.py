"""The road of one call: arrange the batch, sweep each set of columns, merge, apply the row loss, reduce.

A loss is a `RowLoss`: a frozen dataclass of its parameters with `from_stats`, a formula over the statistics of one row.
Autograd through these length-R vectors yields the coefficients dL/dlse_k and dL/dpos; the primitive turns them into the
gradients of z1, z2 and the temperature. A row loss therefore runs on every backend the day it is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, ParamSpec, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..backends import dispatch
from ..batch import distributed
from ..batch.arrangement import LAYOUTS, Arrangement, Layout, arrange, check_pairs, resolve_scale
from ..batch.cancellation import Cancellation
from ..batch.queue import NegativeQueue
from ..checks import check_choice, check_exponents, check_keywords
from ..numerics import logsumexp_pair, own_products
from ..operators.row_stats import row_stats
from ..operators.whole_loss import operators_for, whole_loss
from ..problem.problem import Formula, Statistics
from .dense import DenseLogits, dense_logits
from .overloads import LossFunction, returns_stats
from .stats import Diagnostics, LossStats, summarize, warn_if_clamped

REDUCTIONS = ("mean", "sum", "none")
_P = ParamSpec("_P")


@dataclass(frozen=True)
class RowStatistics:
    """What a row loss sees: vectors of length R, one entry per anchor, in float32 (float64 for float64 inputs).

    lse         log sum over the negatives of exp(beta_k s_ij), one vector per entry of the loss's `exponents`
    pos         logit of the positive, <anchor, positive> * scale
    correction  log-mean-exp of the logits of the debiasing positives; pos unless `positives` was given
    count       number of negatives
    scale       1/temperature, a float or a 0-d tensor
    """

    lse: tuple[Tensor, ...]
    pos: Tensor
    correction: Tensor
    count: Tensor
    scale: float | Tensor


class RowLoss:
    """A contrastive loss as a formula of row statistics. Subclass with a frozen dataclass and write `from_stats`."""

    exponents: tuple[float, ...] = (1.0,)  # the beta_k > 0, one or two, whose log-sum-exps the loss needs
    default_temperature: float = 0.5
    formula: Formula | None = None  # the fused spelling of `from_stats` (csrc/row_losses.h), for the short road

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "from_stats" in cls.__dict__ and "formula" not in cls.__dict__:
            cls.formula = None  # an inherited one is of another loss

    def from_stats(self, stats: RowStatistics) -> Tensor:
        """[R] loss of every row, in nats, differentiable in stats.lse, pos, correction and scale."""
        raise NotImplementedError(f"{type(self).__name__} must define from_stats(self, stats).")

    def dense(self, logits: DenseLogits) -> Tensor:
        """[R] the same loss from the whole matrix, for backend="reference"; by default through `from_stats`."""
        lse = tuple(logits.logsumexp(beta) for beta in self.exponents)
        return self.from_stats(RowStatistics(lse, logits.pos, logits.correction, logits.count, logits.scale))

    def statistics(
        self, batch: Arrangement, diagnostics: bool, backend: str
    ) -> tuple[RowStatistics, Diagnostics | None]:
        """What `from_stats` sees: by default log-sum-exps at `exponents`, one sweep per set of candidates."""
        return _sweep(self.exponents, batch, diagnostics, backend)

    def weighted(self, logits: DenseLogits) -> DenseLogits:
        """The whole matrix with constant weights on its negatives, for a loss that has such weights."""
        return logits

    def clamped(self, stats: RowStatistics) -> Tensor | None:
        """[R] bool, rows whose negatives get no gradient because of a floor; None for a loss without one."""
        return None


class LossOptions(TypedDict, total=False):
    """Keywords every loss function and module takes; `fused_row_loss` documents them."""

    logit_scale: float | Tensor | None
    layout: Layout
    queue: Tensor | NegativeQueue | None
    ids: Tensor | None
    labels: Tensor | None
    queue_ids: Tensor | None
    guide: tuple[Tensor, Tensor] | None
    guide_queue: Tensor | None
    margin: float
    margin_strategy: Literal["absolute", "relative"]
    negatives: Tensor | None
    in_batch_negatives: bool
    normalize: bool
    reduction: Literal["mean", "sum", "none"]
    return_stats: bool
    backend: str
    operand_dtype: torch.dtype | None
    group: dist.ProcessGroup | distributed.AllRanks | None


@returns_stats
@distributed.across_ranks
def fused_row_loss(
    row_loss: RowLoss,
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    layout: Layout = "two_view",
    queue: Tensor | NegativeQueue | None = None,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
    queue_ids: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    guide_queue: Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: Literal["absolute", "relative"] = "absolute",
    negatives: Tensor | None = None,
    in_batch_negatives: bool = True,
    positives: Tensor | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    operand_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Any row loss over a batch of pairs, without forming the similarity matrix; every public loss is this call.

    row_loss     the formula, for instance `Debiased(tau_plus=0.1)` or your own `RowLoss`
    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair; one_way: z2 may have more rows, all negatives
    temperature  > 0, a float or a 0-d tensor to learn it; None is the loss's default
    logit_scale  1/temperature instead (CLIP style), a float or a 0-d tensor; either tensor may be [1], as FSDP keeps it
    layout       "two_view": 2B anchors against all 2B rows; "one_way": z1 against z2; "symmetric": z1 against z2 and
                 back (CLIP)
    queue        [K, D] tensor or NegativeQueue: more negatives, no gradient, used as given (two_view, one_way): with
                 `normalize` its rows should have unit length, as a NegativeQueue makes them; [0, D] is no queue
    ids, labels  [B] integers > -2^63 + 2 (one_way with more columns: [M]), two names of one thing: columns with the
                 anchor's id are never its negatives, whatever image they show
    queue_ids    [K] integers, the ids of a queue given as a tensor
    guide        (g1 [B, E], g2 [B, E]), a guide model's features of z1 and z2: columns it finds more similar to the
                 anchor than the positive, up to `margin`, are no negatives; see cancellation.py. Not for `negatives`.
    guide_queue  [K, E] the guide's features of the queue
    margin, margin_strategy
                 >= 0; the limit is, with c the positive's cosine, "absolute": c - margin, "relative": c - |c| margin;
                 columns at the limit, up to rounding, are kept
    negatives    [K, D] for all anchors or [B, n, D] for each, with gradient (one_way)
    in_batch_negatives  False: only queue and `negatives` (one_way; MoCo)
    positives    [M, B, D] views that replace the partner in a debiasing correction, with gradient
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean", "sum" or "none"
    return_stats also return a `LossStats` record from the same pass
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    operand_dtype
                 torch.float16 or torch.bfloat16 for float32 z1 and z2: products at the 16-bit rate of a GPU from unit
                 rows rounded once (fp16 keeps as much of them as TF32); everything else and the gradients stay float32
    group        `AllRanks()` or a torch.distributed process group: candidates are those of all its ranks. Every rank
                 makes the same call with as many rows (`backend` and `return_stats` may differ), gets loss and
                 statistics of its own anchors and calls backward; what DistributedDataParallel averages is then
                 exactly the gradient of the mean over all anchors, a learned temperature's too. Under torch.compile
                 the call is a graph break.
                 [K, D] `negatives` are gathered as z2 is, [B, n, D] and `positives` stay with their anchors, a queue
                 has to be the same on all ranks (`enqueue(keys, group=group)`)
    Returns      float32 (float64 for float64 inputs), nats: 0-d, or [2B] (two_view; symmetric: rows, then columns) or
                 [B] (one_way) for "none". A row without negatives has loss 0 and counts in the mean.
    Raises       ValueError or TypeError on shapes, dtypes, ranges and undefined combinations; RuntimeError with the
                 reason if a named backend cannot run, or with a group before init_process_group. With a group all ranks
                 raise where one does, or where their calls differ, naming ranks and arguments
    Memory       O((B + M + K) D); time O(B (B + M + K) D); once differentiable unless backend="reference". A group of W
                 ranks has W times the columns, and a call waits once for the device, to compare the calls of all ranks
                 (not where the group has a backend for the host, "cpu:gloo,cuda:nccl")
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if ids is not None and labels is not None:
        raise ValueError("give ids or labels, not both: columns with an equal integer are ignored either way.")
    check_row_loss(row_loss)
    dispatch.check_backend_name(backend)
    cancellation = Cancellation(
        labels if ids is None else ids, queue_ids, guide, guide_queue, margin, margin_strategy,
        ids_name="ids" if labels is None else "labels",
    )  # fmt: skip
    with numerics.without_autocast(z1):
        more = (queue, negatives, positives, guide_queue, operand_dtype, group)
        plain = all(x is None for x in more) and cancellation.is_empty and in_batch_negatives
        if plain and not return_stats and row_loss.formula is not None:
            check_pairs(z1, z2, layout)
            operators = operators_for(row_loss, z1, z2, layout, backend)
            if operators is not None:
                scale = resolve_scale(temperature, logit_scale, row_loss.default_temperature, z1)
                check_exponents(row_loss.exponents, scale, numerics.stats_dtype(z1.dtype))
                return whole_loss(operators, row_loss, z1, z2, scale, layout, normalize, reduction)
        if group is not None and backend != dispatch.REFERENCE:  # it may be missing on one rank
            check_pairs(z1, z2, layout)
            operands = numerics.resolve_operand_dtype(z1.dtype, operand_dtype)
            dispatch.select(backend, z1.device, numerics.stats_dtype(z1.dtype), operands, z1.shape[1])
        batches = arrange(
            z1, z2, temperature, logit_scale=logit_scale, default_temperature=row_loss.default_temperature,
            layout=layout, queue=queue, negatives=negatives, in_batch_negatives=in_batch_negatives,
            positives=positives, normalize=normalize, cancellation=cancellation, operand_dtype=operand_dtype,
            group=group,
        )  # fmt: skip
        check_exponents(row_loss.exponents, batches[0].scale, batches[0].pos.dtype)
        path = _dense if backend == dispatch.REFERENCE else _streamed
        losses, stats, diagnostics = _end_to_end([path(row_loss, batch, return_stats, backend) for batch in batches])
        loss = losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
        if diagnostics is None:
            return loss
        rounding = torch.cat([batch.rounding() for batch in batches])
        return loss, summarize(stats, diagnostics, row_loss.clamped(stats), rounding, normalize)


def check_values(
    layout: str, margin: float, margin_strategy: str, reduction: str, backend: str, operand_dtype: torch.dtype | None
) -> None:
    """TypeError or ValueError for what no batch could make right."""
    check_choice("layout", layout, LAYOUTS)
    check_choice("reduction", reduction, REDUCTIONS)
    Cancellation(margin=margin, margin_strategy=margin_strategy)
    dispatch.check_backend_name(backend)
    numerics.resolve_operand_dtype(torch.float64 if operand_dtype == torch.float64 else torch.float32, operand_dtype)


def check_row_loss(row_loss: object) -> None:
    """TypeError unless it is the instance of a `RowLoss`."""
    if not isinstance(row_loss, RowLoss):
        raise TypeError(f"row_loss must be a RowLoss, for instance Debiased(tau_plus=0.1); got {row_loss!r:.60}.")


_Rows = tuple[Tensor, RowStatistics, Diagnostics | None]  # losses, what they were made of, what was asked beside


def _end_to_end(parts: list[_Rows]) -> _Rows:
    """Rows of one arrangement after those of the other."""
    if len(parts) == 1:
        return parts[0]
    losses, stats, diagnostics = zip(*parts, strict=True)
    joined = RowStatistics(
        lse=tuple(torch.cat(vectors) for vectors in zip(*(s.lse for s in stats), strict=True)),
        pos=torch.cat([s.pos for s in stats]),
        correction=torch.cat([s.correction for s in stats]),
        count=torch.cat([s.count for s in stats]),
        scale=stats[0].scale,
    )
    if diagnostics[0] is None:
        return torch.cat(losses), joined, None
    fields = zip(*diagnostics, strict=True)
    return (
        torch.cat(losses),
        joined,
        Diagnostics._make(torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in fields),
    )


def _streamed(row_loss: RowLoss, batch: Arrangement, return_stats: bool, backend: str) -> _Rows:
    stats, diagnostics = row_loss.statistics(batch, return_stats, backend)
    # what ids and gates cancel the device alone knows: only candidates without them are certain
    certain = replace(batch, column_sets=tuple(s for s in batch.column_sets if s.ids is None and s.gate is None))
    if candidates_of(certain) == 0:
        empty = stats.count == 0
        losses = _zero_where(empty, row_loss.from_stats(_without_empty(stats, empty)), batch.pos)
    else:
        losses = row_loss.from_stats(stats)
    warn_if_clamped(lambda: row_loss.clamped(stats), batch.pos.device)
    return losses, stats, diagnostics


def _sweep(
    exponents: tuple[float, ...], batch: Arrangement, diagnostics: bool, backend: str
) -> tuple[RowStatistics, Diagnostics | None]:
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
    return stats, Diagnostics(negatives, largest, total, lse_squared, candidates_of(batch))


def _dense(row_loss: RowLoss, batch: Arrangement, return_stats: bool, backend: str) -> _Rows:
    matrix = row_loss.weighted(dense_logits(batch))
    empty = ~matrix.negative.any(1)
    stand_in = matrix.negative.clone()
    stand_in[:, 0] |= empty  # a formula may divide by the number of negatives; the row's loss is 0 all the same
    losses = _zero_where(empty, row_loss.dense(replace(matrix, negative=stand_in)), batch.pos)
    lse = tuple(matrix.logsumexp(beta) for beta in row_loss.exponents)
    stats = RowStatistics(lse, batch.pos, batch.correction, matrix.count, batch.scale)
    if not return_stats:
        return losses, stats, None
    hardest = matrix.logits.masked_fill(~matrix.negative, -torch.inf).amax(1)
    total = matrix.logits.where(matrix.negative, 0.0).sum(1)
    squared = matrix.logsumexp(2 * row_loss.exponents[0])
    mean_weight, max_weight = matrix.weight_statistics()
    return (
        losses,
        stats,
        Diagnostics(matrix.count, hardest, total, squared, candidates_of(batch), mean_weight, max_weight),
    )


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


def candidates_of(batch: Arrangement) -> int:
    """Negatives every anchor would have if none were cancelled."""
    anchors, candidates = batch.anchors.shape[0], 0
    for columns in batch.column_sets:
        candidates += anchors if columns.v is None else columns.v.shape[0]
        candidates -= anchors // columns.num_images if columns.num_images else 0
    return candidates + (0 if batch.row_negatives is None else batch.row_negatives.shape[1])


def _without_empty(stats: RowStatistics, empty: Tensor) -> RowStatistics:
    """Finite stand-ins for rows without negatives, so that a formula and its derivative stay finite there."""
    return replace(
        stats,
        lse=tuple(x.masked_fill(empty, 0.0) for x in stats.lse),
        pos=stats.pos.masked_fill(empty, 0.0),
        correction=stats.correction.masked_fill(empty, 0.0),
        count=stats.count.masked_fill(empty, 1.0),
    )


def _zero_where(empty: Tensor, losses: Tensor, pos: Tensor) -> Tensor:
    """0 in empty rows, but NaN where the row's own positive is not finite: bad input never hides."""
    return torch.where(empty, 0.0 * pos, losses)


def loss_function(function: Callable[_P, Tensor | tuple[Tensor, LossStats]]) -> LossFunction[_P, LossStats]:
    """A public loss that takes `LossOptions` as **options and no others: they show in its signature; `across_ranks`."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    common = inspect.signature(fused_row_loss).parameters
    options = [common[name] for name in LossOptions.__annotations__ if name not in own.parameters]
    known = tuple(p.name for p in (*kept, *options))

    @functools.wraps(function)
    def checked(*args, **keywords):
        check_keywords(function.__name__, keywords, known)
        return function(*args, **keywords)

    checked.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return returns_stats(distributed.across_ranks(checked))
