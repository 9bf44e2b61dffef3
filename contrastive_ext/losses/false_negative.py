"""False-negative cancellation (FNC): negatives that look like the anchor's own image are left out, or attracted.

    eliminate  L_a = log sum_{k != a, k not in F} e^{s_ak} - mean_P s_ap
    attract    L_a = log sum_{k != a} e^{s_ak} - (sum_P s_ap + sum_F s_am) / (|P| + |F|)

P: the V - 1 other views of the anchor's image, in the sum as well. F: its detected false negatives (detection.py), a
constant that all anchors of the image share. The sum over negatives, lse_a, is streamed without P; P joins it outside:
log sum = softplus(lse_a - lse_P) + lse_P.

Huynh et al., WACV 2022, arXiv:2011.11765.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.columns import Columns, keys_alone
from ..batch.detection import Candidates, Detected, Lists, detect
from ..batch.queue import NegativeQueue
from ..checks import check_choice, check_number, check_tensor, describe
from ..numerics import logsumexp_pair, softplus
from ..operators.row_stats import row_stats
from ..operators.unit_rows import operand
from ..problem.pairs import NO_COLUMN, NO_COLUMN_ID, UNFILLED
from .overloads import returns_stats
from .supcon import image_labels

DEFAULT_TEMPERATURE = 0.1
MODES = ("attract", "eliminate")
AGGREGATES = ("max", "mean")


@dataclass(frozen=True)
class FalseNegativeStats:
    """What was detected; 0-d tensors on the device of the inputs.

    cancelled_fraction   share of an anchor's candidates (columns of other images) that are detected false negatives
    detected             mean |F|, false negatives per image
    empty_rows           anchors left without any negative
    positive_similarity  mean similarity to the other views of the image, cosine if inputs are normalised
    precision            with labels: share of the detected that have the image's label (NaN if none are detected)
    recall               with labels: share of the candidates with the image's label that are detected (NaN if none)
    """

    cancelled_fraction: Tensor
    detected: Tensor
    empty_rows: Tensor
    positive_similarity: Tensor
    precision: Tensor | None = None
    recall: Tensor | None = None

    def to_dict(self) -> dict[str, float]:
        """The fields that were computed as floats, for a logger; waits for the device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}


@returns_stats
@distributed.across_ranks
def fused_false_negative_loss(
    views: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    support: Tensor | None = None,
    mode: Literal["attract", "eliminate"] = "attract",
    top_k: int | None = 10,
    threshold: float | None = 0.7,
    aggregate: Literal["max", "mean"] = "max",
    keys: Tensor | None = None,
    queue: Tensor | NegativeQueue | Columns | None = None,
    labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, FalseNegativeStats]:
    """InfoNCE over views [V, B, D], views first, that detects false negatives and eliminates or attracts them (FNC).

    eliminate: log sum_{k != a, k not in F} e^{s_ak} - mean_P s_ap
    attract:   log sum_{k != a} e^{s_ak} - (sum_P s_ap + sum_F s_am) / (V - 1 + |F|)

    views        [V, B, D] fp16/bf16/fp32/fp64, V >= 2 views of B images: the anchors, and without `keys` the columns
    temperature  > 0, or a 0-d tensor to learn it; default 0.1
    logit_scale  1/temperature instead
    support      [S, B, D] further views of the images that only score, no gradient; without it `keys` score, or `views`
    mode         "attract" or "eliminate"
    top_k, threshold
                 F holds the columns of other images among the top_k scores (ties: the lower column) and above
                 `threshold`; None switches a criterion off, one must stay
    aggregate    score of a column: the "max" over the scoring views of an image, or the "mean"
    keys         [V, B, D] momentum features: columns instead of `views`, no gradient; an anchor's own key is left out
    queue        [K, D] tensor, NegativeQueue or `Columns`: older columns, no gradient, used as given
    labels       [B] integers > -2^63 + 2: return_stats then reports how well F finds equal labels (ids of a queue are
                 its labels); the loss does not depend on them
    normalize    scale rows (not the queue's) to unit length first; False: used as given, scores are dot products
    reduction    "mean" over V B anchors, "sum" or "none"; the released total is twice this mean
    return_stats also return a `FalseNegativeStats`
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: columns, and so F, are of all its ranks (ties:
                 own columns, then lower ranks), loss and statistics of a rank's own images, which its own `support` or
                 `keys` score; the queue has to be the same on all ranks
    Returns      float32 (float64 for float64 inputs), nats: 0-d, or [V, B] for "none"
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(V B D + K D + V B top_k); time O(V^2 B^2 D); a threshold alone is asked again in every pass, which
                 costs time, not memory; once differentiable
    Paper        arXiv:2011.11765. Attraction with a threshold <= .8 alone is known to collapse; published best top_k: 4
                 for attraction, 8 for elimination.
    """
    call = Call(
        temperature=temperature, logit_scale=logit_scale, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize,
        reduction=reduction, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_values(mode, top_k, threshold, aggregate)
    distributed.check_gathers(group, "false negatives are detected among the columns of all ranks.")
    labels = _check(views, support, keys, labels)
    older = keys_alone(queue, views, normalize, ids=True)
    with numerics.without_autocast(views):
        scale = call.scale(views)
        ranks = call.agree(group, views)
        batch = _arrange(views, scale, support, aggregate, keys, older, labels, normalize, ranks, backend)
        road = _dense if call.is_dense else _streamed
        losses, count, detected = road(batch, mode, top_k, threshold, backend)
        loss = call.reduce(losses, ranks)
        if not return_stats:
            return loss
        return loss, _summarize(batch, detected, count, labels)


@dataclass(frozen=True)
class _Batch:
    views: Tensor  # [V, B, D]
    columns: tuple[Tensor, ...]  # [M, D] each; the first shows the images, others are those of other ranks and a queue
    own_columns: bool  # the first are the anchors themselves
    candidates: list[Candidates]  # what is scored: the same columns without gradient
    scorers: Tensor  # [S, B, D]
    scale: float | Tensor
    positives: Tensor  # [V B, V - 1] logits of the other views
    unit: tuple[bool, ...]  # of each of the columns
    operand_dtype: torch.dtype

    @property
    def anchors(self) -> Tensor:
        """[V B, D]."""
        return self.views.flatten(0, 1)

    def by_view(self, x: Tensor) -> Tensor:
        """[V B] as [V, B]."""
        return x.view(self.views.shape[:2])


def _arrange(
    views, scale, support, aggregate, keys, queue: Columns | None, labels, normalize, ranks, backend
) -> _Batch:
    images = views.shape[1]
    made = partial(operand, unit=normalize, backend=backend)
    anchors = made(views)
    older = None if queue is None else queue.as_set(views.dtype)
    if older is not None:
        anchors = numerics.spoil(anchors, older.keys)
    shown = anchors if keys is None else made(keys.detach())
    scorers = made(support.detach()) if support is not None else shown.detach()
    if aggregate == "mean":
        scorers = scorers.mean(0, keepdim=True)
    positives = scale * _products_with_other_views(anchors, shown)

    columns = [shown.flatten(0, 1)]
    own_scorers = support is None and aggregate == "max"
    candidates = [Candidates(columns[0].detach(), num_images=images, are_scorers=own_scorers)]
    if ranks is not None:
        for of_others, ids in _of_other_ranks(columns[0], views.dtype, labels, ranks):
            columns.append(of_others)
            candidates.append(Candidates(of_others.detach(), ids=ids))
    unit = [normalize] * len(columns)
    if older is not None:
        columns.append(older.keys)
        candidates.append(Candidates(older.keys, ids=older.ids))
        unit.append(False)
    return _Batch(
        anchors, tuple(columns), keys is None, candidates, scorers, scale, positives.flatten(0, 1),
        tuple(unit), views.dtype,
    )  # fmt: skip


def _products_with_other_views(anchors: Tensor, shown: Tensor) -> Tensor:
    """[V, B, V - 1] of anchors [V, B, D] and shown [V, B, D]."""
    num_views, images, _ = anchors.shape
    if num_views == 2:  # a matrix of four for every image and its gradient take four times as long
        return (anchors * shown.flip(0)).sum(2, keepdim=True)
    every = numerics.product(anchors.transpose(0, 1), shown.permute(1, 2, 0)).transpose(0, 1)
    view = torch.arange(num_views, device=anchors.device)
    others = (view[:, None] + view[1:]) % num_views  # indices, not a mask: its size would have to be waited for
    return every.gather(2, others[:, None].expand(-1, images, -1))


def _of_other_ranks(own: Tensor, wire: torch.dtype, labels: Tensor | None, ranks) -> list[tuple[Tensor, Tensor | None]]:
    """Columns of the lower and of the higher ranks, where there are any, and their labels."""
    everyone = ranks.rows(own)
    here, columns = everyone.own, everyone.gather(own, wire)
    sizes = [here.start, own.shape[0], columns.shape[0] - here.stop]
    lower, _, higher = columns.split(sizes)
    ids = [None] * 3
    if labels is not None:
        ids = everyone.gather(labels.repeat(own.shape[0] // labels.shape[0])).split(sizes)
    return [(x, known) for x, known in ((lower, ids[0]), (higher, ids[2])) if x.shape[0]]


def _streamed(batch: _Batch, mode, top_k, threshold, backend) -> tuple[Tensor, Tensor, Detected]:
    detected = detect(batch.scorers, batch.candidates, top_k, threshold, batch.views.shape[0], backend)
    lses, counts = [], []
    for at, (columns, candidates) in enumerate(zip(batch.columns, batch.candidates, strict=True)):
        rules = detected.rules(at) if mode == "eliminate" else {}
        # a gate of images asks the rows' question only: then the same vectors go in twice, as rows and as columns
        one_set = at == 0 and batch.own_columns and "gate" not in rules
        swept = row_stats(
            batch.anchors, None if one_set else columns, scale=batch.scale, num_images=candidates.num_images,
            col_ids=candidates.ids, unit=batch.unit[at], operand_dtype=batch.operand_dtype, backend=backend,
            **rules,
        )  # fmt: skip
        lses.append(swept.lse[0])
        counts.append(swept.aux[0])
    attracted: Tensor = batch.positives.mean(1)
    if mode == "attract":
        found = torch.stack([detected.add_up(at, columns) for at, columns in enumerate(batch.columns)]).sum(0)
        more = (batch.scale * (batch.views * found).sum(2)).flatten()
        number = _count(batch, detected).repeat(batch.views.shape[0])
        others = batch.positives.shape[1]
        attracted = (batch.positives.sum(1) + more) / (others + number)
    lse, lse_positives = reduce(logsumexp_pair, lses), batch.positives.logsumexp(1)
    # in this order: with two views and nothing detected the bracket is exactly 0
    losses = softplus(lse - lse_positives) + (lse_positives - attracted)
    return batch.by_view(losses), torch.stack(counts).sum(0), detected


def _count(batch: _Batch, detected: Detected) -> Tensor:
    return torch.stack([detected.count(at) for at in range(len(batch.columns))]).sum(0)


def _dense(batch: _Batch, mode, top_k, threshold, backend) -> tuple[Tensor, Tensor, Detected]:
    """The paper's steps on whole matrices."""
    images, device = batch.scorers.shape[1], batch.anchors.device
    columns = torch.cat(batch.columns)
    number = torch.arange(columns.shape[0], device=device)
    image_of_column = torch.where(number < batch.anchors.shape[0], number % images, -1)
    image = torch.arange(batch.anchors.shape[0], device=device) % images
    exists = torch.ones(columns.shape[0], dtype=torch.bool, device=device)
    if batch.candidates[-1].ids is not None:
        exists[-batch.columns[-1].shape[0] :] = batch.candidates[-1].ids != UNFILLED

    candidate = (image_of_column != torch.arange(images, device=device)[:, None]) & exists
    scores = (batch.scorers @ columns.detach().T).amax(0)
    candidate = candidate & ~scores.isnan()
    rank = scores.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True).indices.argsort(1)
    found = candidate
    if top_k is not None:
        found = found & (rank < top_k)
    if threshold is not None:
        found = found & (scores > threshold)

    logits = batch.scale * numerics.product(batch.anchors, columns.T)
    own = number == torch.arange(batch.anchors.shape[0], device=device)[:, None]
    positive = (image_of_column == image[:, None]) & ~own
    false_negative = found[image]
    kept = exists & ~own & ~(false_negative & (mode == "eliminate"))
    attracted = positive | false_negative if mode == "attract" else positive
    mean = logits.where(attracted, 0.0).sum(1) / attracted.sum(1)
    negative = kept & ~positive
    # log(1 + negatives/positives), not the log of both: a converged row keeps its gradient
    log_positives = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    empty = ~negative.any(1)
    log_negatives = logits.masked_fill(~negative & ~empty[:, None], -torch.inf).logsumexp(1)
    losses = softplus(log_negatives.masked_fill(empty, -torch.inf) - log_positives) + (log_positives - mean)
    detected = Lists.split(torch.where(found, number, NO_COLUMN), batch.candidates)
    return batch.by_view(losses), negative.sum(1), detected


@torch.no_grad()
def _summarize(batch: _Batch, detected: Detected, negatives: Tensor, labels: Tensor | None) -> FalseNegativeStats:
    images = batch.scorers.shape[1]
    number = _count(batch, detected).to(batch.anchors.dtype)
    candidates = torch.zeros_like(number)
    for one in batch.candidates:
        exists = one.features.shape[0] if one.ids is None else (one.ids != UNFILLED).sum()
        candidates += exists - (one.features.shape[0] // images if one.num_images else 0)
    precision = recall = None
    if labels is not None:
        right, known, there = torch.zeros(3, images, dtype=torch.int64, device=labels.device)
        for at, one in enumerate(batch.candidates):
            own = one.features.shape[0] // images if one.num_images else 0
            column_labels = labels.repeat(own) if own else one.ids
            if column_labels is None:
                continue  # a queue given as a tensor: its labels are not known
            right += detected.count(at, labels, column_labels)
            known += detected.count(at, torch.ones_like(labels), (column_labels > NO_COLUMN_ID).long())
            ordered = column_labels.sort().values
            there += torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels) - own
        found = right.sum().to(number.dtype)
        precision, recall = found / known.sum(), found / there.sum()
    return FalseNegativeStats(
        cancelled_fraction=number.sum() / candidates.sum(),
        detected=number.mean(),
        empty_rows=(negatives == 0).sum(),
        positive_similarity=batch.positives.detach().mean() / batch.scale,
        precision=precision,
        recall=recall,
    )


def check_values(mode: str, top_k: int | None, threshold: float | None, aggregate: str) -> None:
    """TypeError or ValueError for what no batch could make right."""
    check_choice("mode", mode, MODES)
    check_choice("aggregate", aggregate, AGGREGATES)
    if top_k is None and threshold is None:
        raise ValueError("top_k and threshold cannot both be None: that would make every column a false negative.")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer >= 1, or None for the threshold alone; got {top_k!r}.")
    if threshold is not None:
        check_number("threshold", threshold)
        if threshold != threshold:  # math.isnan refuses the symbolic numbers of torch.compile
            raise ValueError("threshold must be a number, or None for top_k alone; got nan.")


def _check(views, support, keys, labels) -> Tensor | None:
    """The labels, int64 [B]."""
    if not isinstance(views, Tensor) or views.dtype not in numerics.SUPPORTED_DTYPES:
        raise TypeError(f"views must be a tensor of float16, bfloat16, float32 or float64; got {describe(views)}.")
    if views.dim() != 3 or views.shape[0] < 2 or 0 in views.shape:
        raise ValueError(f"views must be [V, B, D] with V >= 2 and B, D >= 1; got {list(views.shape)}.")
    _, images, dim = views.shape
    for name, x, shape in (("support", support, (images, dim)), ("keys", keys, (images, dim))):
        if x is None:
            continue
        check_tensor(name, x)
        if x.dim() != 3 or x.shape[1:] != shape or x.shape[0] == 0 or (name == "keys" and x.shape[0] != views.shape[0]):
            first = views.shape[0] if name == "keys" else "S"
            raise ValueError(f"{name} must be [{first}, {images}, {dim}]; got {list(x.shape)}.")
        if x.dtype != views.dtype or x.device != views.device:
            raise TypeError(f"{name} must be {views.dtype} on {views.device} like views; got {x.dtype} on {x.device}.")
    return None if labels is None else image_labels(labels, views)
