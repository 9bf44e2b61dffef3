"""The road of one call: check it, arrange the batch, sweep each set of columns, apply the row loss, reduce.

Every public loss over pairs is `fused_row_loss` with a `RowLoss`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, ParamSpec, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.arrangement import Arrangement, arrangements
from ..batch.cancellation import Guide
from ..batch.columns import Columns
from ..batch.queue import NegativeQueue
from ..batch.request import Layout, Request
from ..checks import can_read, check_exponents, check_keywords
from ..operators.whole_loss import operators_for, whole_loss
from .dense import dense_logits
from .matryoshka import Matryoshka
from .overloads import LossFunction, returns_stats
from .row_loss import RowLoss, RowStatistics, check_row_loss
from .stats import Diagnostics, LossStats, summarize, warn_if_clamped
from .sweeps import sweep

_P = ParamSpec("_P")


class LossOptions(TypedDict, total=False):
    """Keywords every loss function and module takes; `fused_row_loss` documents them."""

    logit_scale: float | Tensor | None
    layout: Layout
    queue: Tensor | NegativeQueue | Columns | None
    ids: Tensor | None
    labels: Tensor | None
    guide: tuple[Tensor, Tensor] | Guide | None
    positive_index: Tensor | None
    negatives: Tensor | Columns | None
    in_batch_negatives: bool
    normalize: bool
    reduction: Literal["mean", "sum", "none"]
    return_stats: bool
    backend: str
    operand_dtype: torch.dtype | Literal["fp16x3", "bf16x3"] | None
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
    queue: Tensor | NegativeQueue | Columns | None = None,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | Guide | None = None,
    positive_index: Tensor | None = None,
    negatives: Tensor | Columns | None = None,
    in_batch_negatives: bool = True,
    positives: Tensor | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    operand_dtype: torch.dtype | Literal["fp16x3", "bf16x3"] | None = None,
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Any row loss over a batch of pairs, without forming the similarity matrix; every public loss is this call.

    row_loss     the formula, for instance `Debiased(tau_plus=0.1)` or your own `RowLoss`
    z1, z2       [B, D] fp16/bf16/fp32/fp64, row i of each is a pair; z2 may have more rows (one_way: all negatives)
    temperature  > 0, a float or a 0-d tensor to learn it, one_way also [B], one a row; None is the loss's default
    logit_scale  1/temperature instead (CLIP style), a float or a 0-d tensor; either tensor may be [1], as FSDP keeps it
    layout       "two_view": 2B anchors against all 2B rows; "one_way": z1 against z2; "symmetric": z1 against z2 and
                 back (CLIP); or a tuple of directions that are one sum in row i, "q2d" (z1_i against z2) with any of
                 "q2q" (z1_i against z1), "d2q" (z2_i against z1), "d2d" (z2_i against z2; a query's further documents
                 by `ids`), own rows left out (InfoNCE and decoupled). With d2q the positive stands in the sum twice.
                 z2 may have more rows than z1 but for "two_view"; they are documents of no query
    positive_index
                 [B] int64 (one_way): the row of z2 that is the positive of each row of z1; z2 may then be shorter.
                 On an accelerator their range is not looked at, which would wait for the device
    queue        [K, D] tensor, NegativeQueue, or `Columns` with ids, guide features or weights: more negatives, no
                 gradient, used as given (two_view, one_way): with `normalize` its rows should have unit length, as a
                 NegativeQueue makes them; [0, D] is no queue
    ids, labels  [B] integers > -2^63 + 2 (one_way with more columns: [M]), two names of one thing: columns with the
                 anchor's id are never its negatives, whatever image they show
    guide        (g1 [B, E], g2 [B, E]), a guide model's features of z1 and z2, or a `Guide` with a margin: columns it
                 finds more similar to the anchor than the positive are no negatives
    negatives    [K, D] for all anchors or [B, n, D] for each, with gradient, or `Columns` with ids, guide features or
                 weights of them; negatives of z1, of "q2d" in a tuple (not two_view)
    in_batch_negatives  False: only queue and `negatives` (one_way; MoCo)
    positives    [M, B, D] views that replace the partner in a debiasing correction, with gradient
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean", "sum" or "none"
    return_stats also return a `LossStats` record from the same pass
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    operand_dtype
                 torch.float16 or torch.bfloat16 for float32 z1 and z2: products at the 16-bit rate of a GPU from unit
                 rows rounded once (fp16 keeps as much of them as TF32); everything else and the gradients stay float32.
                 "fp16x3" (Triton, D <= 256): nothing is rounded, products as three of fp16 parts on tensor cores, as
                 exact as in float32 (histograms of ranks stay in float32). "bf16x3" (cpu, with AMX; an error without):
                 nothing is rounded, products as six of bf16 parts, as exact as in float32
    group        `AllRanks()` or a torch.distributed process group: candidates are those of all its ranks. Every rank
                 makes the same call with as many rows (`backend` and `return_stats` may differ, with
                 `AllRanks(uneven=True)` numbers of rows too), gets loss and statistics of its own anchors and calls
                 backward; what DistributedDataParallel averages is then exactly the gradient of the mean over all
                 anchors, a learned temperature's too. Under torch.compile the call is a graph break.
                 [K, D] `negatives` are gathered as z2 is, [B, n, D] and `positives` stay with their anchors, a queue
                 has to be the same on all ranks (`enqueue(keys, group=group)`). `AllRanks(exchange="ring")` does it
                 without holding the candidates of more than one other rank at a time
    Returns      float32 (float64 for float64 inputs), nats: 0-d, or [2B] (two_view; symmetric: rows, then columns) or
                 [B] (one_way, tuples) for "none". A row without negatives has loss 0 (log 2 where the positive stands
                 in the sum twice) and counts in the mean.
    Raises       ValueError or TypeError on shapes, dtypes, ranges and undefined combinations; RuntimeError with the
                 reason if a named backend cannot run, or with a group before init_process_group. With a group all ranks
                 raise where one does, or where their calls differ, naming ranks and arguments
    Memory       O((B + M + K) D); time O(B (B + M + K) D); once differentiable unless backend="reference". A group of W
                 ranks has W times the columns (a ring: those of one other rank), and a call waits once for the device,
                 to compare the calls of all ranks (not where the group has a backend for the host,
                 "cpu:gloo,cuda:nccl")
    """
    check_row_loss(row_loss)
    if ids is not None and labels is not None:
        raise ValueError("give ids or labels, not both: columns with an equal integer are ignored either way.")
    request = Request(
        z1=z1, z2=z2, temperature=temperature, logit_scale=logit_scale, layout=layout, positive_index=positive_index,
        default_temperature=row_loss.default_temperature,
        queue=Columns.of(queue), negatives=Columns.of(negatives, "negatives"), in_batch_negatives=in_batch_negatives,
        positives=positives,
        ids=labels if ids is None else ids, ids_name="ids" if labels is None else "labels", guide=Guide.of(guide),
        normalize=normalize, reduction=reduction, return_stats=return_stats, backend=backend,
        operand_dtype=operand_dtype, group=group,
    ).checked()  # fmt: skip
    row_loss.check(request)
    with numerics.without_autocast(z1):
        scale = request.row_scale()
        check_exponents(row_loss.exponents, scale, numerics.stats_dtype(z1.dtype))
        ranks = request.agree(group, z1, request.products)  # the checks are done
        return _computed(row_loss, request, scale, ranks)


def _computed(
    row_loss: RowLoss, request: Request, scale: float | Tensor, ranks: distributed.Ranks | None
) -> Tensor | tuple[Tensor, LossStats]:
    if isinstance(row_loss, Matryoshka):
        return _over_prefixes(row_loss, request, scale, ranks)
    z1, z2, layout, backend = request.z1, request.z2, request.layout, request.backend
    if request.is_plain and row_loss.formula is not None:
        assert isinstance(layout, str)
        operators = operators_for(z1, z2, layout, backend)
        if operators is not None:
            options = scale, layout, request.normalize, request.reduction
            loss, clamped = whole_loss(operators, row_loss.formula, row_loss.exponents, z1, z2, *options)
            if clamped is not None:
                warn_if_clamped(lambda: clamped, z1.device)
            return loss
    road = _dense if request.is_dense else _streamed
    batches = arrangements(request, scale, ranks)
    total, rows, parts = sum(batch.pos.shape[0] for batch in batches), 0, []
    for batch in batches:
        own = slice(rows, rows := rows + batch.pos.shape[0])
        parts.append(road(row_loss.of_rows(own, total), batch, request.return_stats, backend))
    losses, stats, diagnostics = _end_to_end(parts)
    loss = request.reduce(losses, ranks)
    if diagnostics is None:
        return loss
    rounding = torch.cat([batch.rounding() for batch in batches])
    return loss, summarize(stats, diagnostics, row_loss.clamped(stats), rounding, request.normalize)


def _over_prefixes(
    row_loss: Matryoshka, request: Request, scale: float | Tensor, ranks: distributed.Ranks | None
) -> Tensor | tuple[Tensor, LossStats]:
    losses, stats = [], None
    for weight, part in row_loss.parts(request):
        result = _computed(row_loss.loss, part, scale, ranks)
        loss, stats = result if isinstance(result, tuple) else (result, None)
        losses.append(weight * loss)
    total = torch.stack(losses).sum(0)
    return total if stats is None else (total, stats)


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
    return torch.cat(losses), joined, Diagnostics._make(map(_joined, zip(*diagnostics, strict=True)))


def _joined(field: tuple) -> Tensor | float | None:
    """One field of the diagnostics of arrangements with as many rows each: vectors end to end, of numbers the mean."""
    if field[0] is None:
        return None
    return torch.cat(field) if isinstance(field[0], Tensor) else sum(field) / len(field)


def _streamed(row_loss: RowLoss, batch: Arrangement, return_stats: bool, backend: str) -> _Rows:
    stats, diagnostics = sweep(row_loss, batch, return_stats, backend)
    # what ids and gates cancel the device alone knows: only candidates without them are certain
    sets = tuple(s for s in batch.column_sets if s.ids is None and s.gate is None)
    own = None if batch.own is None or batch.own.kept is not None else batch.own
    certain = replace(batch, column_sets=sets, own=own)
    empty = stats.count == 0 if certain.candidates == 0 else None
    if empty is not None and (not can_read(empty) or bool(empty.any())):  # a look in place of ten operations each way
        nothing = row_loss.without_negatives(batch.positive_terms)
        losses = _where_empty(empty, row_loss.from_stats(stats.without_empty(empty)), batch.pos, nothing)
    else:
        losses = row_loss.from_stats(stats)
    warn_if_clamped(lambda: row_loss.clamped(stats), batch.pos.device)
    return losses, stats, diagnostics


def _dense(row_loss: RowLoss, batch: Arrangement, return_stats: bool, backend: str) -> _Rows:
    matrix = row_loss.weighted(dense_logits(batch, row_loss.hardness_of))
    empty = ~matrix.negative.any(1)
    stand_in = matrix.negative.clone()
    stand_in[:, 0] |= empty  # a formula may divide by the number of negatives; the row's loss is 0 all the same
    nothing = row_loss.without_negatives(batch.positive_terms)
    losses = _where_empty(empty, row_loss.dense(replace(matrix, negative=stand_in)), batch.pos, nothing)
    lse = tuple(matrix.logsumexp(beta) for beta in row_loss.exponents)
    stats = RowStatistics(lse, batch.pos, batch.correction, matrix.count, batch.row_scale, batch.positive_terms)
    if not return_stats:
        return losses, stats, None
    hardest = matrix.similarities.masked_fill(~matrix.negative, -torch.inf).amax(1)
    total = matrix.similarities.where(matrix.negative, 0.0).sum(1)
    squared = matrix.logsumexp(2 * row_loss.exponents[0])
    mean_weight, max_weight = matrix.weight_statistics()
    beside = Diagnostics(matrix.count, hardest, total, squared, batch.candidates, mean_weight, max_weight)
    return losses, stats, beside


def _where_empty(empty: Tensor, losses: Tensor, pos: Tensor, nothing: float) -> Tensor:
    """`nothing` in empty rows, but NaN where the row's own positive is not finite: bad input never hides."""
    return torch.where(empty, 0.0 * pos + nothing, losses)


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
