"""How a batch becomes anchors, sets of candidate columns and positives: one place for what N is in every layout.

    two_view   anchors [z1; z2], 2B; candidates the same rows (+ queue)                 negatives 2B - 2 + K
    one_way    anchors z1 [B]; candidates z2 [M >= B] (+ queue) (+ explicit negatives)  negatives M - 1 + K
    symmetric  anchors z1 and z2, each against the other                                negatives B - 1 each

With a process group the anchors stay those of this rank, and the candidates (the queue aside) are those of all ranks.

`arrange` checks the call, normalises, rounds to the operand dtype and computes the positive logits in float32
(float64). Every path, streaming or dense, starts from its `Arrangement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..checks import can_read, check_choice, check_positive, check_tensor, describe
from ..problem.pairs import Gate
from . import distributed
from .cancellation import Cancellation
from .queue import NegativeQueue, check_lengths

Layout = Literal["two_view", "one_way", "symmetric"]
LAYOUTS = ("two_view", "one_way", "symmetric")


@dataclass(frozen=True)
class ColumnSet:
    """One set of candidates of every anchor; v None means the anchors themselves."""

    v: Tensor | None
    num_images: int = 0  # > 0: columns from positive_offset on show the anchors' images, view by view (pairs.py)
    positive_offset: int = 0
    ids: Tensor | None = None  # of the columns
    gate: Gate | None = None
    unit: bool = False


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

    def rounding(self) -> Tensor:
        """[R] how far the positive's logit may lie from an equal one by rounding."""
        return numerics.rounding_of_logits(self.scale, *self.pair).repeat(self.pos.shape[0] // self.pair[0].shape[0])


def arrange(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None,
    *,
    logit_scale: float | Tensor | None,
    default_temperature: float,
    layout: Layout,
    queue: Tensor | NegativeQueue | None,
    negatives: Tensor | None,
    in_batch_negatives: bool,
    positives: Tensor | None,
    normalize: bool,
    cancellation: Cancellation,
    operand_dtype: torch.dtype | None,
    group: dist.ProcessGroup | distributed.AllRanks | None,
) -> tuple[Arrangement, ...]:
    """Check the arguments of a loss over pairs and arrange them; raises before anything is computed.

    One arrangement, or with a group and layout="symmetric" one per direction: the columns of other ranks are no anchors
    here.
    """
    keys, key_ids = (queue.data, queue.ids) if isinstance(queue, NegativeQueue) else (queue, None)
    check_pairs(z1, z2, layout)
    _check_extras(z1, z2, layout, keys, negatives, in_batch_negatives, positives)
    cancellation = cancellation.checked(z1, z2, keys, queue_has_ids=key_ids is not None)
    key_ids = cancellation.queue_ids if key_ids is None else key_ids
    if keys is not None and keys.shape[0] == 0:
        keys = key_ids = None
    check_lengths(queue, normalize)
    scale = resolve_scale(temperature, logit_scale, default_temperature, z1)
    operand_dtype = numerics.resolve_operand_dtype(z1.dtype, operand_dtype)
    process_group = distributed.agree(group)  # the checks are done
    direction = partial(
        _direction, scale=scale, keys=keys, key_ids=key_ids, negatives=negatives,
        in_batch_negatives=in_batch_negatives, positives=positives, normalize=normalize, operand_dtype=operand_dtype,
        group=process_group,
    )  # fmt: skip
    if process_group is None or layout != "symmetric":
        return (direction(z1, z2, layout, cancellation),)
    reverse = replace(cancellation, guide=cancellation.guide and cancellation.guide[::-1])
    return direction(z1, z2, "one_way", cancellation), direction(z2, z1, "one_way", reverse)


def _direction(
    z1: Tensor,
    z2: Tensor,
    layout: str,
    cancellation: Cancellation,
    *,
    scale: float | Tensor,
    keys: Tensor | None,
    key_ids: Tensor | None,
    negatives: Tensor | None,
    in_batch_negatives: bool,
    positives: Tensor | None,
    normalize: bool,
    operand_dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> Arrangement:
    dtype = numerics.stats_dtype(z1.dtype)
    operand = partial(numerics.operand, unit=normalize, dtype=operand_dtype)

    def of_all_ranks(own: ColumnSet) -> ColumnSet:
        return own if group is None else _gathered(own, anchors, operand_dtype, group)

    if layout == "two_view":
        anchors = operand(torch.cat([z1, z2]))
        u1, u2 = anchors[: z1.shape[0]], anchors[z1.shape[0] :]
    else:
        anchors = u1 = operand(z1)
        u2 = operand(z2)
    batch, views = z1.shape[0], 1 if layout == "one_way" else 2
    column_sets, row_negatives = [], None
    two_view = layout == "two_view"
    ids = cancellation.ids
    column_ids = torch.cat([ids, ids]) if two_view and ids is not None else ids
    gate, key_gate = cancellation.gates(two_view, dtype, both_ways=layout != "one_way")
    if in_batch_negatives:
        v = None if two_view else u2
        own = ColumnSet(v, num_images=batch, ids=column_ids, gate=gate, unit=normalize)
        column_sets.append(of_all_ranks(own))
    if keys is not None:
        keys = numerics.round_operand(keys.detach().to(dtype), operand_dtype)
        column_sets.append(ColumnSet(keys, ids=key_ids, gate=key_gate))
    if negatives is not None and negatives.dim() == 2:
        column_sets.append(of_all_ranks(ColumnSet(operand(negatives), unit=normalize)))
    elif negatives is not None:
        row_negatives = operand(negatives)

    pos = scale * (u1 * u2[:batch]).sum(-1)
    pos = torch.cat([pos] * views) if views > 1 else pos
    if keys is not None:
        pos = numerics.spoil(pos, keys)
    correction = pos
    if positives is not None:
        anchors_by_view = torch.stack([u1, u2][:views])
        logits = scale * numerics.product(anchors_by_view.transpose(0, 1), operand(positives).permute(1, 2, 0))
        correction = logits.logsumexp(2).T.flatten() - math.log(positives.shape[0])
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
        anchor_ids=None if column_ids is None else column_ids[: anchors.shape[0]],
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


def resolve_scale(
    temperature: float | Tensor | None, logit_scale: float | Tensor | None, default_temperature: float, like: Tensor
) -> float | Tensor:
    """1/temperature, a float or a 0-d tensor of the statistics dtype on the device of `like`; ValueError if not > 0."""
    if temperature is not None and logit_scale is not None:
        raise ValueError("give temperature or logit_scale (= 1/temperature), not both.")
    name, value = ("logit_scale", logit_scale) if logit_scale is not None else ("temperature", temperature)
    if value is None:
        value = default_temperature
    dtype = numerics.stats_dtype(like.dtype)
    if isinstance(value, Tensor):
        if value.shape not in ((), (1,)) or not value.is_floating_point() or value.device != like.device:
            raise ValueError(
                f"a {name} tensor must be a 0-d (or [1]) floating-point tensor on {like.device}; got {describe(value)}."
            )
        value = value.reshape(()).to(dtype)
        if can_read(value):
            check_positive(name, value.item(), dtype)
    else:
        check_positive(name, value, dtype)
    return value if name == "logit_scale" else 1.0 / value


def check_pairs(z1: Tensor, z2: Tensor, layout: str) -> None:
    """ValueError or TypeError unless z1 and z2 are pairs in this layout."""
    check_choice("layout", layout, LAYOUTS)
    for name, z in (("z1", z1), ("z2", z2)):
        check_tensor(name, z)
        if z.dtype not in numerics.SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {z.dtype}.")
    if z1.dtype != z2.dtype or z1.device != z2.device:
        raise TypeError(
            f"z1 and z2 must share dtype and device; got {z1.dtype} on {z1.device} and {z2.dtype} on {z2.device}."
        )
    shapes = f"got {list(z1.shape)} and {list(z2.shape)}."
    if z1.dim() != 2 or z2.dim() != 2 or z1.shape[1] != z2.shape[1] or 0 in z1.shape:
        raise ValueError(f"z1 and z2 must be [B, D] with B, D >= 1; {shapes}")
    if layout == "one_way":
        if z2.shape[0] < z1.shape[0]:
            raise ValueError(f"with layout='one_way' z2 must be [M, D] with M >= B, row i the positive of i; {shapes}")
    elif z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape [B, D]; {shapes}")


def _check_extras(
    z1: Tensor,
    z2: Tensor,
    layout: str,
    keys: Tensor | None,
    negatives: Tensor | None,
    in_batch_negatives: bool,
    positives: Tensor | None,
) -> None:
    batch, dim = z1.shape
    for name, x in (("queue", keys), ("negatives", negatives), ("positives", positives)):
        if x is not None:
            check_tensor(name, x)
    if keys is not None:
        check_queue(keys, dim, z1.device)
        if layout == "symmetric" and keys.shape[0] > 0:
            raise ValueError("layout='symmetric' takes no queue: it is undefined which side it would belong to.")
    if negatives is not None:
        if layout != "one_way":
            raise ValueError(f"explicit negatives need layout='one_way'; got layout={layout!r}.")
        shared = negatives.dim() == 2
        own = negatives.dim() == 3 and negatives.shape[0] == batch
        if not (shared or own) or negatives.shape[-1] != dim or negatives.shape[-2] == 0:
            raise ValueError(
                f"negatives must be [K, {dim}] or [{batch}, n, {dim}] with K, n >= 1; got {describe(negatives)}."
            )
        _check_like(negatives, z1, "negatives")
    if positives is not None:
        if positives.dim() != 3 or positives.shape[1:] != z1.shape or positives.shape[0] == 0:
            raise ValueError(f"positives must be [M, {batch}, {dim}] with M >= 1; got {describe(positives)}.")
        _check_like(positives, z1, "positives")
    if not in_batch_negatives:
        no_queue = keys is None or keys.shape[0] == 0
        if layout != "one_way" or (no_queue and negatives is None):
            raise ValueError(
                "in_batch_negatives=False needs layout='one_way' and a queue or explicit negatives; [0, D] is no queue."
            )
        if z2.shape[0] != batch:
            raise ValueError(f"with in_batch_negatives=False z2 must be [{batch}, {dim}]; got {describe(z2)}.")


def check_queue(keys: Tensor, dim: int, device: torch.device, name: str = "queue") -> None:
    """TypeError or ValueError unless keys are floating-point [K, dim] on `device`; K = 0 is no queue."""
    check_tensor(name, keys)
    is_matrix = keys.dim() == 2 and keys.shape[1] == dim
    if not is_matrix or not keys.is_floating_point() or keys.device != device:
        raise ValueError(f"{name} must be floating-point [K, {dim}] on {device}; got {describe(keys)}.")


def _check_like(tensor: Tensor, z1: Tensor, name: str) -> None:
    if tensor.dtype != z1.dtype or tensor.device != z1.device:
        raise TypeError(f"{name} must be {z1.dtype} on {z1.device} like z1; got {describe(tensor)}.")
