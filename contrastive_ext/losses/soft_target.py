"""Soft targets: cross-entropy of a student against a teacher's distribution over the same constant keys.

    L_i = -sum_k y_ik log softmax_k(<x_i, key_k>/t) = lse_i - <x_i, Y_i>/t,     Y_i = sum_k y_ik key_k

A target acts through the mean Y_i alone, an attention output whose values are the keys; so does the gradient, which is
(O(x_i) - Y_i)/t with O the student's own mean. One sweep of the keys for the teacher and one for the student make both
in the forward; neither the targets nor the probabilities are ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.columns import Columns, ColumnSet, keys_alone
from ..batch.queue import NegativeQueue
from ..checks import check_positive, check_tensor
from ..numerics import logsumexp_pair
from ..operators.row_stats import row_stats
from ..operators.unit_rows import operand
from ..problem.pairs import UNFILLED
from .overloads import returns_stats
from .stats import Record

DEFAULT_TEMPERATURE = 0.1


@dataclass(frozen=True)
class SoftTargetStats(Record):
    """Averages over the rows; entropies and the divergence in nats.

    divergence          KL(teacher || student): the loss without the teacher's entropy, which no student can lower
    teacher_entropy     entropy of the targets
    student_entropy     entropy of the student's distribution
    teacher_confidence  largest target of a row
    """

    divergence: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    teacher_confidence: Tensor


@returns_stats
@distributed.across_ranks
def fused_soft_target_loss(
    queries: Tensor,
    keys: Tensor | NegativeQueue,
    teacher: Tensor,
    temperature: float | Tensor | None = None,
    *,
    teacher_temperature: float,
    queue: Tensor | NegativeQueue | Columns | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, SoftTargetStats]:
    """Cross-entropy between two distributions over keys, without forming either of the N x M matrices.

    L_i = -sum_k y_ik log softmax_k(<x_i, key_k>/t),   y_i = softmax_k(<teacher_i, key_k>/t_teacher)

    queries      [N, D] fp16/bf16/fp32/fp64, the student's vectors x_i; they alone get a gradient
    keys         [M, D] tensor like queries, or a NegativeQueue, whose unfilled rows are ignored
    teacher      [N, D] like queries, constant: row i makes the target of query i
    temperature  > 0, or a 0-d tensor to learn it; the student's; default 0.1
    teacher_temperature  > 0, usually the lower one: sharper targets
    queue        [K, D] tensor or NegativeQueue: more keys, used as given
    normalize    scale queries, teacher and a tensor of keys to unit length first
    reduction    "mean", "sum" or "none"
    return_stats also return a `SoftTargetStats` record from the same sweeps
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: the distributions are over the keys of all its
                 ranks, [M, D] on each, the loss is that of a rank's own queries. A NegativeQueue, `keys` or `queue`,
                 and a tensor as `queue` have to be the same on all ranks and are not gathered
    Returns      0-d float32 (float64 for float64 inputs) or [N] ("none"); nats. A row without any key has loss 0.
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O((N + M) D), the keys are not copied; 8 N M D flops in the forward, the backward is O(N D)
    Paper        used by SEED (arXiv:2101.04731), ReSSL (arXiv:2107.09282); with own keys left out by SANE, see
                 `fused_self_labeling_loss`
    """
    call = Call(
        temperature=temperature, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize, reduction=reduction,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_values(teacher_temperature)
    distributed.check_gathers(group, "its keys are constants, which are gathered once.")
    check_vectors({"queries": queries, "teacher": teacher})
    if teacher.shape != queries.shape:
        raise ValueError(f"teacher must be [N, D] like queries; got {list(teacher.shape)} and {list(queries.shape)}.")
    check_positive("teacher_temperature", teacher_temperature, numerics.stats_dtype(queries.dtype))
    with numerics.without_autocast(queries):
        scale = call.scale(queries)
        sets = [_given_keys(keys, queries, normalize, backend), *older_keys(queue, queries, normalize)]
        ranks = call.agree(group, queries)
        if ranks is not None and isinstance(keys, Tensor):
            own = sets[0].keys
            sets[0] = replace(sets[0], v=ranks.rows(own).gather(own, queries.dtype))
        road = _dense if call.is_dense else _streamed
        x, u = (operand(rows, normalize, backend=backend) for rows in (queries, teacher.detach()))
        for one in sets:
            x = numerics.spoil(x, one.keys)
        losses, stats = road(x, sets, u, scale, 1.0 / teacher_temperature, queries.dtype, return_stats, backend)
        loss = call.reduce(losses, ranks)
    return loss if stats is None else (loss, stats)


def _streamed(x, sets, teacher, scale, teacher_scale, operand_dtype, return_stats, backend):
    with torch.no_grad():
        target = sweep_keys(teacher, sets, teacher_scale, operand_dtype, backend, means=True, maximum=return_stats)
    student = sweep_keys(x, sets, scale, operand_dtype, backend, means=return_stats)
    pos = scale * (x * target.mean).sum(1)
    one_choice = target.number <= 1  # all distributions over none or one key are equal
    # 0 times the logit: NaN where the query is, bad input never hides
    losses = torch.where(one_choice, 0.0 * pos, student.lse.masked_fill(one_choice, 0.0) - pos)
    if not return_stats:
        return losses, None
    with torch.no_grad():
        teacher_entropy = target.entropy(teacher, teacher_scale)
        return losses, SoftTargetStats(
            divergence=(losses - teacher_entropy).mean(),
            teacher_entropy=teacher_entropy.mean(),
            student_entropy=student.entropy(x, scale).mean(),
            teacher_confidence=target.largest_weight().mean(),
        )


def _dense(x, sets, teacher, scale, teacher_scale, operand_dtype, return_stats, backend):
    keys = dense_keys(sets)
    if keys.shape[0] == 0:
        losses = 0.0 * x.sum(1)
        return losses, SoftTargetStats(*4 * [losses.detach().mean()]) if return_stats else None
    targets = (teacher_scale * (teacher @ keys.T)).softmax(1)
    logits = scale * numerics.product(x, keys.T)
    losses = cross_entropy(logits, targets)
    if not return_stats:
        return losses, None
    with torch.no_grad():
        return losses, SoftTargetStats(
            divergence=(losses - entropy(targets)).mean(),
            teacher_entropy=entropy(targets).mean(),
            student_entropy=entropy(logits.softmax(1)).mean(),
            teacher_confidence=targets.amax(1).mean(),
        )


class KeyStatistics(NamedTuple):
    """What one sweep says of every row's distribution over the keys; [0] tensors where not asked for.

    lse      [N] log of the sum over the keys of e^s
    number   [N] how many keys
    largest  [N] largest logit s
    mean     [N, D] softmax-weighted mean of the keys; 0 without any key
    """

    lse: Tensor
    number: Tensor
    largest: Tensor
    mean: Tensor

    def largest_weight(self) -> Tensor:
        """[N] the largest probability; 0 without any key."""
        return torch.exp(self.largest - self.lse).masked_fill(self.lse == -torch.inf, 0.0)

    def entropy(self, rows: Tensor, scale: float | Tensor) -> Tensor:
        """[N] entropy of the distribution; 0 of none or one key."""
        mean_logit = scale * (rows * self.mean).sum(1)
        return torch.where(self.number <= 1, 0.0 * mean_logit, self.lse - mean_logit)


def sweep_keys(
    rows: Tensor,
    sets: Sequence[ColumnSet],
    scale: float | Tensor,
    operand_dtype: torch.dtype,
    backend: str,
    *,
    leave_out: Tensor | None = None,
    means: bool = False,
    maximum: bool = False,
) -> KeyStatistics:
    """Statistics of `rows` over the union of `sets`, which is never put together in memory.

    leave_out   [N] int64, the id in the first set that a row skips
    """
    parts = []
    for i, keys in enumerate(sets):
        swept = row_stats(
            rows, keys.v, scale=scale, row_ids=leave_out if i == 0 else None, col_ids=keys.ids, means=means,
            maximum=maximum, unit=keys.unit, operand_dtype=operand_dtype, backend=backend,
        )  # fmt: skip
        nothing = rows.new_empty(0)
        largest, mean = swept.aux[1] if maximum else nothing, swept.mean[0].detach() if means else nothing
        parts.append(KeyStatistics(swept.lse[0], swept.aux[0], largest, mean))
    return reduce(_union, parts)


def _union(one: KeyStatistics, other: KeyStatistics) -> KeyStatistics:
    lse, mean = logsumexp_pair(one.lse, other.lse), one.mean
    if mean.dim() == 2:
        share = torch.sigmoid(one.lse - other.lse).masked_fill(lse == -torch.inf, 0.0).detach()
        mean = torch.lerp(other.mean, one.mean, share[:, None])
    return KeyStatistics(lse, one.number + other.number, torch.maximum(one.largest, other.largest), mean)


def older_keys(
    queue: Tensor | NegativeQueue | Columns | None, like: Tensor, normalize: bool, name: str = "queue"
) -> list[ColumnSet]:
    """The queue beside other keys, used as given; without a queue, or with an empty tensor, none."""
    columns = keys_alone(queue, like, normalize, name)
    return [] if columns is None else [columns.as_set(like.dtype)]


def _given_keys(keys: Tensor | NegativeQueue, queries: Tensor, normalize: bool, backend: str) -> ColumnSet:
    if isinstance(keys, NegativeQueue):
        return older_keys(keys, queries, normalize, "keys")[0]
    check_vectors({"queries": queries, "keys": keys})
    return ColumnSet(operand(keys.detach(), normalize, backend=backend), unit=normalize)


def dense_keys(sets: Sequence[ColumnSet]) -> Tensor:
    """[M, D] all keys of the reference path, without the unfilled ones."""
    return torch.cat([x.keys if x.ids is None else x.keys[x.ids != UNFILLED] for x in sets])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] -sum_k y_k log softmax_k(logits)."""
    return -(targets * logits.log_softmax(1)).sum(1)


def entropy(probabilities: Tensor) -> Tensor:
    """[N] -sum_k p_k log p_k."""
    return -torch.special.xlogy(probabilities, probabilities).sum(1)


def check_values(teacher_temperature: float) -> None:
    """TypeError or ValueError for what no batch could make right."""
    check_positive("teacher_temperature", teacher_temperature, torch.float64)  # and, with a batch, in its dtype


def check_vectors(named: dict[str, Tensor]) -> None:
    """TypeError or ValueError unless all are non-empty [., D] matrices that share D, a supported dtype and a device."""
    for name, z in named.items():
        check_tensor(name, z)
        if z.dtype not in numerics.SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {z.dtype}.")
    (first, like), *others = named.items()
    if like.dim() != 2 or 0 in like.shape:
        raise ValueError(f"{first} must be [N, D] with N, D >= 1; got {list(like.shape)}.")
    for name, z in others:
        if z.dtype != like.dtype or z.device != like.device:
            raise TypeError(
                f"{first} and {name} must share dtype and device; got {like.dtype} on {like.device} and {z.dtype} on "
                f"{z.device}."
            )
        if z.dim() != 2 or 0 in z.shape or z.shape[1] != like.shape[1]:
            raise ValueError(f"{name} must be [., {like.shape[1]}] and not empty; got {list(z.shape)}.")
