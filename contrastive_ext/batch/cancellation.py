"""False negatives the caller knows of: equal integer ids, or a guide model that finds two items too similar.

A cancelled column is ignored as a negative of that anchor, inside the tile loop: no [N, M] mask is ever formed. Ids are
compared as they are. A guide scores every column by the cosine of its own features; a column is cancelled where

    cos(g_i, g_j) > p_i - margin              margin_strategy="absolute",  p_i = cos(g_i, g_pos(i))
    cos(g_i, g_j) > p_i - |p_i| * margin      margin_strategy="relative"

which is the rule of GISTEmbed (Solatorio 2024, arXiv:2402.16829). Both sides are rounded, so a column counts as above
the limit only beyond their rounding error: one at the limit, at margin 0 a duplicate of the positive, is kept whatever
the backend and the size. A guide that is NaN finds nothing similar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import numerics
from ..checks import check_choice, check_number, check_tensor, describe, integers
from ..problem.pairs import Gate

MARGIN_STRATEGIES = ("absolute", "relative")


@dataclass(frozen=True)
class Cancellation:
    """What a call says about false negatives; `fused_row_loss` documents the fields, ids_name is what it called ids."""

    ids: Tensor | None = None
    queue_ids: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None
    guide_queue: Tensor | None = None
    margin: float = 0.0
    margin_strategy: str = "absolute"
    ids_name: str = "ids"

    def __post_init__(self) -> None:
        for name, x in ((self.ids_name, self.ids), ("queue_ids", self.queue_ids), ("guide_queue", self.guide_queue)):
            if x is not None:
                check_tensor(name, x)
        if self.guide is not None:
            if not isinstance(self.guide, (tuple, list)) or len(self.guide) != 2:
                raise TypeError(
                    f"guide must be a pair (g1, g2) of tensors, features of z1 and z2; got {describe(self.guide)}."
                )
            check_tensor("guide[0]", self.guide[0])
            check_tensor("guide[1]", self.guide[1])
        check_number("margin", self.margin)
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin must be >= 0 and finite; got {self.margin}.")
        check_choice("margin_strategy", self.margin_strategy, MARGIN_STRATEGIES)

    @property
    def is_empty(self) -> bool:
        """Whether the call says nothing about false negatives."""
        # not == of the dataclass: that compares tensors, which torch.compile before torch 2.13 does not trace
        tensors = (self.ids, self.queue_ids, self.guide, self.guide_queue)
        return all(x is None for x in tensors) and self.margin == 0.0 and self.margin_strategy == "absolute"

    def checked(self, z1: Tensor, z2: Tensor, keys: Tensor | None, queue_has_ids: bool) -> Cancellation:
        """The same with ids as int64 vectors; raises where anything does not fit a batch z1, z2 with queue `keys`."""
        dtype = numerics.stats_dtype(z1.dtype)
        if self.margin > torch.finfo(dtype).max:
            raise ValueError(f"margin must be finite in {dtype}; got {self.margin}.")
        ids = queue_ids = None
        if self.ids is not None:
            ids = integers(self.ids_name, self.ids, z2.shape[0], z1.device)
        if self.queue_ids is not None:
            if keys is None or queue_has_ids or self.ids is None:
                raise ValueError(
                    "queue_ids belong to a queue given as a tensor, compared with the batch's ids or labels; "
                    "a NegativeQueue holds its own: queue.enqueue(keys, ids)."
                )
            queue_ids = integers("queue_ids", self.queue_ids, keys.shape[0], z1.device)
        self._check_guide(z1, z2, keys)
        return replace(self, ids=ids, queue_ids=queue_ids)

    def _check_guide(self, z1: Tensor, z2: Tensor, keys: Tensor | None) -> None:
        if self.guide is None:
            if self.guide_queue is not None or self.margin != 0.0:
                raise ValueError("guide_queue and margin need guide=(g1, g2), the guide's features of z1 and z2.")
            return
        g1, g2 = self.guide
        dim = g1.shape[-1] if g1.dim() else 0
        _check_features("guide[0]", g1, z1.shape[0], dim, z1.device)
        _check_features("guide[1]", g2, z2.shape[0], dim, z1.device)
        unscored = keys is not None and keys.shape[0] > 0 and self.guide_queue is None
        if unscored or (keys is None and self.guide_queue is not None):
            raise ValueError("guide_queue and queue go together: the guide scores every column, the queue's too.")
        if keys is not None and self.guide_queue is not None:
            _check_features("guide_queue", self.guide_queue, keys.shape[0], dim, z1.device)

    def gates(self, two_view: bool, dtype: torch.dtype, both_ways: bool) -> tuple[Gate | None, Gate | None]:
        """The gates of the batch's own columns and of the queue's."""
        if self.guide is None:
            return None, None
        g1, g2 = (numerics.normalize(g.detach().to(dtype)) for g in self.guide)
        positive = (g1 * g2[: g1.shape[0]]).sum(1)
        below = self.margin if self.margin_strategy == "absolute" else positive.abs() * self.margin
        limit = positive - below + numerics.rounding_of_products(dtype, g1.shape[1])
        rows, columns = (torch.cat([g1, g2]),) * 2 if two_view else (g1, g2)
        limit = torch.cat([limit, limit]) if two_view else limit
        batch = Gate(rows[None], columns, limit, limit if both_ways else None)
        if self.guide_queue is None:
            return batch, None
        return batch, Gate(rows[None], numerics.normalize(self.guide_queue.detach().to(dtype)), limit)


def _check_features(name: str, x: Tensor, length: int, dim: int, device: torch.device) -> None:
    if not x.is_floating_point() or x.shape != (length, dim) or x.device != device:
        raise ValueError(f"{name} must be floating-point [{length}, {dim}] on {device}; got {describe(x)}.")
