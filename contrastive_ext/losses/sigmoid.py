"""Sigmoid loss (SigLIP): every pair of the batch is a binary question, with no sum over the row in between.

    L_i = softplus(-(s_ii + b)) + sum_{j != i} softplus(s_ij + b)

Pairs of equal id are positives too: softplus(-(s_ij + b)). Zhai et al., ICCV 2023, arXiv:2303.15343.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.request import check_pairs
from ..batch.ring import Ring
from ..batch.ring_sums import sums_of_all
from ..checks import can_read, check_number, describe
from ..numerics import softplus
from ..operators.unit_rows import operand
from ..problem.pairs import integers
from .overloads import returns_stats
from .stats import Record

DEFAULT_SCALE, DEFAULT_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class SigmoidStats(Record):
    """Averages over the rows, or over their pairs; 0-d tensors on the device of the inputs.

    positive_similarity   mean similarity of the pairs (z1_i, z2_i)
    positive_probability  mean sigmoid(s + b) of these pairs: 1 once they are told apart
    negative_probability  mean sigmoid(s + b) of the pairs that are no positives: 0 once they are
    positives             mean number of positives of a row, 1 without ids
    """

    positive_similarity: Tensor
    positive_probability: Tensor
    negative_probability: Tensor
    positives: Tensor


@returns_stats
@distributed.across_ranks
def fused_sigmoid_loss(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor = DEFAULT_SCALE,
    logit_bias: float | Tensor = DEFAULT_BIAS,
    *,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    operand_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, SigmoidStats]:
    """Sigmoid loss (SigLIP) of pairs, the sum over all columns for every row, without the similarity matrix.

    L_i = softplus(-(s_ii + b)) + sum_{j != i} softplus(s_ij + b),  s = logit_scale <z1_i, z2_j>

    z1, z2       [B, D] and [M >= B, D] fp16/bf16/fp32/fp64, row i of each is a pair; further rows of z2 are negatives
    logit_scale  > 0, or a 0-d tensor to learn it; default 10
    logit_bias   b, a number or a 0-d tensor to learn it; default -10, with which the many negatives weigh little at
                 first
    ids          [B] or, of all columns, [M] integers > -2^63 + 2: pairs of equal id are positives, not negatives
    normalize    scale rows to unit length first (zero rows stay zero, with zero gradient); False: used as given
    reduction    "mean" over the rows z1 (the paper's 1/B), "sum" or "none" [B]
    return_stats also return a `SigmoidStats`
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    operand_dtype  as in `fused_row_loss`
    group        `AllRanks()` or a process group as in `fused_row_loss`: columns of all its ranks
    Returns      float32 (float64 for float64 inputs), nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run, with the reason
    Memory       O((B + M) D); time O(B M D), with ids twice; once differentiable
    Paper        Zhai et al., ICCV 2023, arXiv:2303.15343
    """
    call = Call(
        logit_scale=logit_scale, default_temperature=1 / DEFAULT_SCALE, normalize=normalize, reduction=reduction,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_pairs(z1, z2, "one_way")
    if isinstance(operand_dtype, str):
        raise ValueError(f"operand_dtype={operand_dtype!r} is one of losses of log-sum-exps: give a dtype or None.")
    operands = numerics.resolve_operand_dtype(z1.dtype, operand_dtype)
    rows = z1.shape[0]
    if ids is not None:
        ids = integers("ids", ids, z2.shape[0], z1.device)
    with numerics.without_autocast(z1):
        dtype = numerics.stats_dtype(z1.dtype)
        scale, bias = call.scale(z1), _bias(logit_bias, z1.device, dtype)
        ranks = call.agree(group, z1, operands)
        u1, u2 = (operand(z, normalize, operands, backend=backend) for z in (z1, z2))
        pair = scale * (u1 * u2[:rows]).sum(1) + bias
        columns, column_ids, own, ring = u2, ids, 0, None
        if ranks is not None:
            everyone = ranks.rows(u2)
            if ranks.exchange == "ring":
                ring = Ring(everyone, operands, u2.device)
            else:
                columns, own = everyone.gather(u2, operands), everyone.own.start
                column_ids = None if ids is None else everyone.gather(ids)
        row_ids = None if ids is None else ids[:rows]
        if call.is_dense:
            others = _dense(scale * numerics.product(u1, columns.T) + bias, own, row_ids, column_ids)
        else:
            how: dict[str, Any] = {
                "scale": scale, "num_images": rows, "positive_offset": own, "row_ids": row_ids, "ids": column_ids,
                "operand_dtype": operands, "backend": backend, "ring": ring,
            }  # fmt: skip
            offset = bias.expand(rows)
            others = [sums_of_all(u1, columns, offset=offset, **how)]
            if ids is not None:
                others.append(sums_of_all(u1, columns, offset=-offset, sign=-1, only_equal_ids=True, **how))
        losses = softplus(-pair)
        for part in others:
            losses = losses + part[0]
        loss = call.reduce(losses, ranks)
    if not return_stats:
        return loss
    with torch.no_grad():
        negatives, *positives = others
        number = 1 + sum(part[2].mean() for part in positives)
        return loss, SigmoidStats(
            ((pair - bias) / scale).mean(),
            pair.sigmoid().mean(),
            negatives[1].sum() / negatives[2].sum().clamp(min=1),
            number if isinstance(number, Tensor) else torch.ones_like(pair[0]),
        )


def check_values(logit_bias: float | Tensor) -> None:
    """ValueError or TypeError for what no batch could make right."""
    if not isinstance(logit_bias, Tensor):
        _bias(logit_bias, torch.device("cpu"), torch.float64)


def _bias(given: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0-d, in the statistics dtype; ValueError or TypeError unless it is one finite number."""
    if isinstance(given, Tensor):
        if given.shape not in ((), (1,)) or not given.is_floating_point() or given.device != device:
            raise ValueError(f"a logit_bias tensor must be a 0-d (or [1]) floating-point tensor on {device}; got "
                             f"{describe(given)}.")  # fmt: skip
        value = given.reshape(()).to(dtype)
        if can_read(value) and not bool(value.isfinite()):
            raise ValueError(f"logit_bias must be finite; got {value.item()}.")
        return value
    check_number("logit_bias", given)
    if not abs(given) <= torch.finfo(dtype).max:
        raise ValueError(f"logit_bias must be finite in {dtype}; got {given}.")
    return torch.full((), given, device=device, dtype=dtype)


def _dense(logits: Tensor, own: int, row_ids: Tensor | None, column_ids: Tensor | None) -> list[tuple[Tensor, ...]]:
    """The same sums from the whole matrix: of negatives, and with ids of the positives that are no pairs."""
    index = torch.arange(logits.shape[0], device=logits.device)
    other = torch.ones_like(logits, dtype=torch.bool)
    other[index, own + index] = False
    if row_ids is None or column_ids is None:
        return [_sums(logits, other)]
    equal = row_ids[:, None] == column_ids
    return [_sums(logits, other & ~equal), _sums(-logits, other & equal)]


def _sums(x: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    kept = x.masked_fill(~chosen, 0.0)
    return softplus(kept).where(chosen, 0.0).sum(1), kept.sigmoid().where(chosen, 0.0).sum(1), chosen.sum(1).to(x.dtype)
