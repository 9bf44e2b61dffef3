"""Supervised contrastive loss (SupCon): every other row of the anchor's label is a positive.

    out  L_i = log sum_{k != i} e^{s_ik} - 1/|P_i| sum_{p in P_i} s_ip
    in   L_i = log sum_{k != i} e^{s_ik} - log 1/|P_i| sum_{p in P_i} e^{s_ip}

The sum over positives inside "out" is <z_i, sum of the class>: no sweep. "in" streams the two parts of the sum apart,
negatives (labels differ) and positives (labels agree), so that a converged row keeps its digits; "out" does so for rows
with a single positive, where it is InfoNCE: the mean of several is another number than their log-sum-exp.

Khosla et al., NeurIPS 2020, arXiv:2004.11362.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.columns import Columns, keys_alone
from ..batch.queue import NegativeQueue
from ..batch.ring import Ring
from ..batch.ring_stats import stats_of_all
from ..checks import check_choice, describe
from ..numerics import logsumexp_pair, softplus
from ..operators.unit_rows import operand
from ..problem.pairs import UNFILLED, integers
from .overloads import returns_stats
from .stats import Record

DEFAULT_TEMPERATURE = 0.1
POSITIVES = ("out", "in")


@dataclass(frozen=True)
class SupConStats(Record):
    """What the labels gave; 0-d tensors on the device of the inputs.

    positives            mean number of positives of a row
    skipped_rows         rows without a positive, which the loss leaves out
    positive_similarity  mean over the other rows of their mean similarity to their positives
    """

    positives: Tensor
    skipped_rows: Tensor
    positive_similarity: Tensor


@returns_stats
@distributed.across_ranks
def fused_supcon_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    positives: Literal["out", "in"] = "out",
    *,
    logit_scale: float | Tensor | None = None,
    queue: NegativeQueue | Columns | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, SupConStats]:
    """Supervised contrastive loss over labelled rows [N, D] or views [V, B, D], views first, without an N x N matrix.

    out: log sum_{k != i} e^{s_ik} - mean_{p in P_i} s_ip
    in:  log sum_{k != i} e^{s_ik} - log mean_{p in P_i} e^{s_ip}

    features     [N, D], or [V, B, D] V views of B images (other libraries take [B, V, D]), fp16/bf16/fp32/fp64
    labels       [N], or [B], integers > -2^63 + 2
    temperature  > 0, or a 0-d tensor to learn it; default 0.1
    positives    where the mean over the positives P_i stands, "out"side of the logarithm or "in"side
    logit_scale  1/temperature instead
    queue        labelled columns beside the rows, `Columns(keys [K, D], ids=labels)` or a NegativeQueue that labels are
                 enqueued with, constant and used as given (unit rows with `normalize`): more positives and negatives
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean" over the rows that have a positive, "sum" or "none"
    return_stats also return a `SupConStats`
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: positives and negatives of all its ranks, the
                 loss of a rank's own rows. "mean" divides by the average over ranks of the rows that have a positive:
                 the ranks' means average to that of the whole batch, in value and gradient. A ring makes one turn more
                 for the positives of "out"; labels are gathered. A queue is the same on all ranks
    Returns      float32 (float64 for float64 inputs), nats: 0-d, or [N] ([V, B]) for "none". A row without positives is
                 skipped: 0, no gradient, not counted in the mean
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O((N + K) D); time O(N (N + K) D), "in" twice that of "out"; once differentiable
    Paper        arXiv:2004.11362; pytorch-metric-learning has "out"
    """
    call = Call(
        temperature=temperature, logit_scale=logit_scale, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize,
        reduction=reduction, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_values(positives)
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
            column_labels, own = everyone.gather(row_labels), everyone.own
            if ranks.exchange == "ring":
                ring = Ring(everyone, features.dtype, z.device)
            else:
                columns = everyone.gather(z, features.dtype)
        held = None if keys is None else keys.as_set(features.dtype)
        every_label = column_labels if held is None or held.ids is None else torch.cat([column_labels, held.ids])
        if call.is_dense:
            everything = columns if held is None else torch.cat([columns, held.keys])
            losses, pos, number = _dense(z, everything, every_label, own, scale, positives)
        else:
            classes = _Classes.of(every_label)
            ids = classes.pairs if positives == "out" else every_label
            if held is not None and positives == "out":
                ids = ids.where(every_label != UNFILLED, UNFILLED)
            of_batch, of_keys = ids[: column_labels.shape[0]], ids[column_labels.shape[0] :]
            number, row_ids = classes.number[own], ids[own]
            if ring is None:
                positive_mean = classes.means(columns if held is None else torch.cat([columns, held.keys]))[own]
            else:
                positive_mean = classes.means_of_all(z, ring, None if held is None else held.keys)
            pos = scale * (z * positive_mean).sum(1)
            how = {"row_ids": row_ids, "scale": scale, "operand_dtype": features.dtype, "backend": backend}
            batch: dict[str, Any] = {"num_images": z.shape[0], "unit": normalize, **how}
            if ring is not None:
                batch |= {"ring": ring, "ids": row_ids}
            elif ranks is not None:
                batch |= {"v": columns, "ids": of_batch, "positive_offset": own.start}
            sets = [batch] if held is None else [batch, {"v": held.keys, "ids": of_keys, **how}]
            losses = _out(z, pos, number, sets) if positives == "out" else _in(z, sets)
        if held is not None:
            losses = numerics.spoil(losses, held.keys)
        has_positives = number > 0
        losses = torch.where(has_positives, losses, 0.0 * z.sum(1))  # 0, but NaN where the row holds one
        loss = call.reduce_counted(losses.view(features.shape[:-1]), has_positives.sum(), ranks)
    if not return_stats:
        return loss
    with torch.no_grad():
        similarity = (pos / scale).masked_fill(~has_positives, 0.0).sum() / has_positives.sum().clamp(min=1)
        return loss, SupConStats(number.to(z.dtype).mean(), (~has_positives).sum(), similarity)


@dataclass(frozen=True)
class _Classes:
    """Labels of N rows as classes 0, 1, ...: which rows each has."""

    order: Tensor  # [N] rows, class by class
    group: Tensor  # [N] class of every row
    members: Tensor  # [N] rows of every class, 0 beyond the last

    @staticmethod
    def of(labels: Tensor) -> _Classes:
        ordered = labels.sort(stable=True)
        starts = ordered.values.diff(prepend=ordered.values[:1] - 1) != 0
        group = torch.empty_like(labels).scatter_(0, ordered.indices, starts.cumsum(0) - 1)
        members = torch.zeros_like(labels).scatter_add_(0, group, torch.ones_like(group))
        return _Classes(ordered.indices, group, members)

    @property
    def number(self) -> Tensor:
        """[N] how many positives every row has."""
        return self.members[self.group] - 1

    @property
    def pairs(self) -> Tensor:
        """[N] ids that two rows share where they are a class of two."""
        index = torch.arange(self.group.shape[0], device=self.group.device)
        return torch.where(self.number == 1, self.group, self.group.shape[0] + index)

    def means(self, z: Tensor) -> Tensor:
        """[N, D] mean of every row's positives among z [N, D], 0 without any."""
        sums = _ClassSums.apply(z, self.order, self.group, self.members)
        return (sums[self.group] - z) / self.number.clamp(min=1)[:, None]

    def means_of_all(self, z: Tensor, ring: Ring, keys: Tensor | None) -> Tensor:
        """[n, D] the same for this rank's rows z [n, D] alone, where the N rows are those of all ranks, then `keys`."""
        everyone = sum(ring.rows.numbers)
        sums = _SumsOfAll.apply(z, ring, self.group[:everyone]) - z
        if keys is not None:
            own = self.group[ring.rows.own]
            ordered = own.sort().values
            of_keys = _sums_at(_place(ordered, self.group[everyone:]), keys, len(ordered) + 1)
            sums = sums + of_keys[_place(ordered, own)]
        return sums / self.number[ring.rows.own].clamp(min=1)[:, None]


def out_against(
    z: Tensor,
    labels: Tensor,
    columns: Tensor,
    column_labels: Tensor,
    scale: float | Tensor,
    *,
    own: bool,
    unit: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """[N] "out" loss of rows z [N, D] among labelled columns [M, D] alone, and how many positives each has there.

    own     column i is row i itself, and no candidate of it
    unit    rows and columns have unit length
    Both are operands in the statistics dtype, with gradient; a row without positives has loss 0. O((N + M) D) memory.
    """
    rows = z.shape[0]
    if own:
        classes = _Classes.of(column_labels)
        mean, number, ids = classes.means(columns)[:rows], classes.number[:rows], classes.pairs
        row_ids = ids[:rows]
    else:
        mean, number, row_ids, ids = _means_among(z, labels, columns, column_labels)
    pos = scale * (z * mean).sum(1)
    how = {
        "v": columns, "num_images": rows if own else 0, "row_ids": row_ids, "ids": ids, "scale": scale,
        "unit": unit, "backend": backend,
    }  # fmt: skip
    return torch.where(number > 0, _out(z, pos, number, [how]), 0.0 * z.sum(1)), number


def _means_among(
    z: Tensor, labels: Tensor, columns: Tensor, column_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_Classes`, of rows that are no columns: means, numbers, and ids of rows and of columns."""
    everyone = torch.cat([column_labels, labels])
    ordered = everyone.sort(stable=True)
    starts = ordered.values.diff(prepend=ordered.values[:1] - 1) != 0
    group = torch.empty_like(everyone).scatter_(0, ordered.indices, starts.cumsum(0) - 1)
    members = torch.zeros_like(everyone).scatter_add_(0, group, torch.ones_like(group))
    of_columns, of_rows = group.split([columns.shape[0], z.shape[0]])
    counted = torch.zeros_like(everyone).scatter_add_(0, of_columns, torch.ones_like(of_columns))
    sums = _ClassSums.apply(torch.cat([columns, torch.zeros_like(z)]), ordered.indices, group, members)
    number = counted[of_rows]
    index = torch.arange(everyone.shape[0], device=z.device)
    ids = torch.where(counted[group] == 1, group, everyone.shape[0] + index)
    col_ids, row_ids = ids.split([columns.shape[0], z.shape[0]])
    return sums[of_rows] / number.clamp(min=1)[:, None], number, row_ids, col_ids


class _ClassSums(torch.autograd.Function):
    """[., D] sum of the rows of every class; segments, not index_add: a fixed order of summation on every device."""

    @staticmethod
    def forward(ctx, z: Tensor, order: Tensor, group: Tensor, members: Tensor) -> Tensor:
        ctx.save_for_backward(group)
        return torch.segment_reduce(z[order], "sum", lengths=members, unsafe=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (group,) = ctx.saved_tensors
        return grad[group], None, None, None


class _SumsOfAll(torch.autograd.Function):
    """[n, D] sum of the rows of all ranks that are of each own row's class, group [N]. Its transpose is itself."""

    @staticmethod
    def forward(ctx, z: Tensor, ring: Ring, group: Tensor) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(group)
        shards = group.split(ring.rows.numbers)
        own = shards[ring.rank].sort().values
        sums = z.new_zeros(len(own) + 1, z.shape[1])
        for step, (v,) in enumerate(ring.round(z)):
            sums += _sums_at(_place(own, shards[ring.rank - step]), v, len(sums))
        return sums[_place(own, shards[ring.rank])]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (group,) = ctx.saved_tensors
        return _SumsOfAll.apply(grad, replace(ctx.ring, wire=grad.dtype), group), None, None


def _place(ordered: Tensor, group: Tensor) -> Tensor:
    """Where each of `group` first stands in `ordered`, beyond its end if it does not."""
    place = torch.searchsorted(ordered, group)
    there = ordered[place.clamp(max=len(ordered) - 1)] == group
    return place.where(there, len(ordered))


def _sums_at(place: Tensor, v: Tensor, number: int) -> Tensor:
    """[number, D] sums of the rows of v that have each place, in a fixed order."""
    lengths = torch.zeros(number, dtype=torch.int64, device=v.device).scatter_add_(0, place, torch.ones_like(place))
    return torch.segment_reduce(v[place.argsort(stable=True)], "sum", lengths=lengths, unsafe=True)


def _out(z: Tensor, pos: Tensor, number: Tensor, sets: list[dict]) -> Tensor:
    gap = _log_sum(z, sets)[0] - pos
    return torch.where(number == 1, softplus(gap), gap)


def _in(z: Tensor, sets: list[dict]) -> Tensor:
    negatives, _ = _log_sum(z, sets)
    log_positives, number = _log_sum(z, sets, only_equal_ids=True)
    log_positives = log_positives.masked_fill(number == 0, 0.0)
    return softplus(negatives - log_positives) + number.clamp(min=1).log()


def _log_sum(z: Tensor, sets: list[dict], **rule) -> tuple[Tensor, Tensor]:
    """[N] log-sum-exp over the candidates of all sets, arguments of `stats_of_all`, and their number."""
    swept = [stats_of_all(z, **columns, **rule) for columns in sets]
    return reduce(logsumexp_pair, (s.lse[0] for s in swept)), torch.stack([s.aux[0] for s in swept]).sum(0)


def _dense(
    z: Tensor, columns: Tensor, labels: Tensor, rows: slice, scale: float | Tensor, positives: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition on the whole matrix, the mean logit of every row's positives and their number.

    Losses are finite, and of no consequence, in rows without positives.
    """
    logits = scale * numerics.product(z, columns.T)
    index = torch.arange(columns.shape[0], device=z.device)
    own = index[rows, None] == index
    positive = (labels[rows, None] == labels) & ~own
    number = positive.sum(1)
    mean = logits.where(positive, 0.0).sum(1) / number.clamp(min=1)

    def log_sum(which: Tensor) -> Tensor:
        stand_in = own & ~which.any(1, keepdim=True)
        return logits.masked_fill(~(which | stand_in), -torch.inf).logsumexp(1)

    # positives outside the sum, as in the sweeps: a converged row keeps its digits
    outside = positive if positives == "in" else positive & (number == 1)[:, None]
    others, base = ~(own | outside) & (labels != UNFILLED), mean if positives == "out" else log_sum(positive)
    gap = log_sum(others) - base
    joined = torch.where(others.any(1), softplus(gap), 0.0 * base)
    if positives == "out":
        return torch.where(number == 1, joined, gap), mean, number
    return joined + number.clamp(min=1).to(logits.dtype).log(), mean, number


def check_values(positives: str) -> None:
    """ValueError for what no batch could make right."""
    check_choice("positives", positives, POSITIVES)


def check_labelled(features: Tensor, labels: Tensor) -> Tensor:
    """The labels, int64 [N] or [B]."""
    if not isinstance(features, Tensor) or features.dtype not in numerics.SUPPORTED_DTYPES:
        raise TypeError(
            f"features must be a tensor of float16, bfloat16, float32 or float64; got {describe(features)}."
        )
    if features.dim() not in (2, 3) or 0 in features.shape:
        raise ValueError(f"features must be [N, D] or [V, B, D], none of them 0; got {list(features.shape)}.")
    return image_labels(labels, features)


def labelled_keys(queue: NegativeQueue | Columns | None, features: Tensor, normalize: bool) -> Columns | None:
    """Checked columns of a queue, which have labels; None if there are none."""
    keys = keys_alone(queue, features, normalize, ids=True)
    if keys is not None and keys.held_ids is None:
        raise ValueError(
            "the queue of a supervised loss needs labels: Columns(keys, ids=labels), or a NegativeQueue with "
            "enqueue(keys, labels)."
        )
    return keys


def image_labels(labels: Tensor, views: Tensor) -> Tensor:
    """Labels of features [N, D] or views [V, B, D] as int64 [N] or [B]; an error says where the axes changed places."""
    first, images = views.shape[0], views.shape[-2]
    misfit = isinstance(labels, Tensor) and labels.shape not in ((images,), (images, 1))
    if views.dim() == 3 and misfit and labels.shape in ((first,), (first, 1)):
        raise ValueError(
            f"labels must be integers [{images}] for views {list(views.shape)}, which are [V, B, D], views first; got "
            f"{describe(labels)}. If they are [B, V, D]: pass them .transpose(0, 1)."
        )
    return integers("labels", labels, images, views.device)
