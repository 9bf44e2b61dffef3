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
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.ring import Ring
from ..batch.ring_stats import ring_stats
from ..checks import check_choice, describe
from ..numerics import softplus
from ..operators.row_stats import row_stats
from ..problem.pairs import integers
from ..problem.problem import Statistics
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
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean" over the rows that have a positive, "sum" or "none"
    return_stats also return a `SupConStats`
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: positives and negatives of all its ranks, the
                 loss of a rank's own rows. "mean" divides by the average over ranks of the rows that have a positive:
                 the ranks' means average to that of the whole batch, in value and gradient. A ring makes one turn more
                 for the positives of "out"; labels are gathered
    Returns      float32 (float64 for float64 inputs), nats: 0-d, or [N] ([V, B]) for "none". A row without positives is
                 skipped: 0, no gradient, not counted in the mean
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O(N D); time O(N^2 D), "in" twice that of "out"; once differentiable
    Paper        arXiv:2004.11362; pytorch-metric-learning has "out"
    """
    call = Call(
        temperature=temperature, logit_scale=logit_scale, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize,
        reduction=reduction, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_values(positives)
    labels = _check(features, labels)
    with numerics.without_autocast(features):
        dtype = numerics.stats_dtype(features.dtype)
        scale = call.scale(features)
        ranks = call.agree(group, features)
        z = numerics.operand(features, normalize).flatten(0, -2)
        row_labels = labels.repeat(z.shape[0] // labels.shape[0])
        columns, column_labels, own, ring = z, row_labels, slice(0, z.shape[0]), None
        if ranks is not None:
            everyone = ranks.rows(z)
            column_labels, own = everyone.gather(row_labels), everyone.own
            if ranks.exchange == "ring":
                ring = Ring(everyone, features.dtype, z.device)
            else:
                columns = everyone.gather(z, features.dtype)
        if call.is_dense:
            losses, pos, number = _dense(z, columns, column_labels, own, scale, positives)
        else:
            classes = _Classes.of(column_labels)
            if ring is None:
                positive_mean = classes.means(columns)[own]
            else:
                positive_mean = classes.means_of_all(z, ring)
            ids = classes.pairs if positives == "out" else column_labels
            number, row_ids = classes.number[own], ids[own]
            pos = scale * (z * positive_mean).sum(1)
            how = {
                "num_images": z.shape[0], "row_ids": row_ids, "scale": scale, "unit": normalize,
                "operand_dtype": features.dtype, "backend": backend,
            }  # fmt: skip
            if ring is not None:
                how |= {"ring": ring, "ids": row_ids}
            elif ranks is not None:
                how |= {"v": columns, "col_ids": ids, "positive_offset": own.start}
            losses = _out(z, pos, number, how) if positives == "out" else _in(z, how)
        has_positives = number > 0
        losses = torch.where(has_positives, losses, 0.0 * z.sum(1))  # 0, but NaN where the row holds one
        rows = has_positives.sum()
        if ranks is not None:  # their mean over ranks: what the ranks average is then the mean over all rows
            rows = ranks.mean(rows.to(dtype))
        if reduction == "none":
            loss = losses.view(features.shape[:-1])
        else:
            loss = losses.sum() if reduction == "sum" else losses.sum() / (rows + (rows == 0))
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

    def means_of_all(self, z: Tensor, ring: Ring) -> Tensor:
        """[n, D] the same for this rank's rows z [n, D] alone, where the N rows are those of all ranks."""
        sums = _SumsOfAll.apply(z, ring, self.group)
        return (sums - z) / self.number[ring.rows.own].clamp(min=1)[:, None]


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
        "v": columns, "num_images": rows if own else 0, "row_ids": row_ids, "col_ids": ids, "scale": scale,
        "unit": unit, "backend": backend,
    }  # fmt: skip
    return torch.where(number > 0, _out(z, pos, number, how), 0.0 * z.sum(1)), number


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
            place = _place(own, shards[ring.rank - step])
            lengths = torch.zeros(len(sums), dtype=torch.int64, device=z.device)
            lengths = lengths.scatter_add_(0, place, torch.ones_like(place))
            sums += torch.segment_reduce(v[place.argsort(stable=True)], "sum", lengths=lengths, unsafe=True)
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


def _swept(z: Tensor, *, ring: Ring | None = None, **how) -> Statistics:
    return row_stats(z, **how) if ring is None else ring_stats(ring, z, **how)


def _out(z: Tensor, pos: Tensor, number: Tensor, how: dict) -> Tensor:
    gap = _swept(z, **how).lse[0] - pos
    return torch.where(number == 1, softplus(gap), gap)


def _in(z: Tensor, how: dict) -> Tensor:
    negatives = _swept(z, **how)
    positives = _swept(z, **how, only_equal_ids=True)
    number = positives.aux[0]
    log_positives = positives.lse[0].masked_fill(number == 0, 0.0)
    return softplus(negatives.lse[0] - log_positives) + number.clamp(min=1).log()


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
    others, base = ~(own | outside), mean if positives == "out" else log_sum(positive)
    gap = log_sum(others) - base
    joined = torch.where(others.any(1), softplus(gap), 0.0 * base)
    if positives == "out":
        return torch.where(number == 1, joined, gap), mean, number
    return joined + number.clamp(min=1).to(logits.dtype).log(), mean, number


def check_values(positives: str) -> None:
    """ValueError for what no batch could make right."""
    check_choice("positives", positives, POSITIVES)


def _check(features: Tensor, labels: Tensor) -> Tensor:
    """The labels, int64 [N] or [B]."""
    if not isinstance(features, Tensor) or features.dtype not in numerics.SUPPORTED_DTYPES:
        raise TypeError(
            f"features must be a tensor of float16, bfloat16, float32 or float64; got {describe(features)}."
        )
    if features.dim() not in (2, 3) or 0 in features.shape:
        raise ValueError(f"features must be [N, D] or [V, B, D], none of them 0; got {list(features.shape)}.")
    return image_labels(labels, features)


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
