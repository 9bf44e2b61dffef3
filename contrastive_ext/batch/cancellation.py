"""False negatives the caller knows of: equal integer ids, or a guide model that finds two items too similar.

A cancelled column is ignored as a negative of that anchor, inside the tile loop: no [N, M] mask is ever formed. Ids are
compared as they are. A guide scores every column by the cosine of its own features; a column is cancelled where

    cos(g_i, g_j) > p_i - margin              p_i = cos(g_i, g_pos(i))
    cos(g_i, g_j) > p_i - |p_i| margin        relative=True

which is the rule of GISTEmbed (Solatorio 2024, arXiv:2402.16829). Both sides are rounded, so a column counts as above
the limit only beyond their rounding error: one at the limit, at margin 0 a duplicate of the positive, is kept whatever
the backend and the size. A guide that is NaN finds nothing similar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import numerics
from ..checks import check_number, check_tensor, describe
from ..problem.pairs import Gate


@dataclass(frozen=True, eq=False)
class Guide:
    """What a guide model says of the batch: `guide=Guide(g1, g2, margin=0.05, relative=True)`, or `guide=(g1, g2)`.

    g1, g2    [B, E] and [B, E] ([M, E] where z2 has M rows), its features of z1 and z2; constants
    margin    >= 0: the limit is, with c the positive's cosine, c - margin, or with `relative` c - |c| margin; columns
              at the limit, up to rounding, are kept
    """

    g1: Tensor
    g2: Tensor
    margin: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        check_tensor("guide[0]", self.g1)
        check_tensor("guide[1]", self.g2)
        check_number("margin", self.margin)
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin must be >= 0 and finite; got {self.margin}.")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative must be True or False; got {self.relative!r:.60}.")

    @staticmethod
    def of(given: tuple[Tensor, Tensor] | Guide | None) -> Guide | None:
        """What a caller gave, as a `Guide`; TypeError for anything else."""
        if given is None or isinstance(given, Guide):
            return given
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise TypeError(
                "guide must be a pair (g1, g2) of tensors, features of z1 and z2, or a Guide with a margin; "
                f"got {describe(given)}."
            )
        return Guide(*given)

    def swapped(self) -> Guide:
        """The same where z1 and z2 change places."""
        return replace(self, g1=self.g2, g2=self.g1)

    def check(self, z1: Tensor, z2: Tensor) -> None:
        """ValueError unless it fits a batch z1, z2."""
        dtype = numerics.stats_dtype(z1.dtype)
        if self.margin > torch.finfo(dtype).max:
            raise ValueError(f"margin must be finite in {dtype}; got {self.margin}.")
        dim = self.g1.shape[-1] if self.g1.dim() else 0
        check_features("guide[0]", self.g1, z1.shape[0], dim, z1.device)
        check_features("guide[1]", self.g2, z2.shape[0], dim, z1.device)

    def gates(
        self, two_view: bool, both_ways: bool, dtype: torch.dtype, further: Tensor | None
    ) -> tuple[Gate, Gate | None]:
        """The gates of the batch's own columns and of further ones, of which the guide has features [K, E]."""
        g1, g2 = (numerics.normalize(g.detach().to(dtype)) for g in (self.g1, self.g2))
        positive = (g1 * g2[: g1.shape[0]]).sum(1)
        below = positive.abs() * self.margin if self.relative else self.margin
        limit = positive - below + numerics.rounding_of_products(dtype, g1.shape[1])
        rows, columns = (torch.cat([g1, g2]),) * 2 if two_view else (g1, g2)
        limit = torch.cat([limit, limit]) if two_view else limit
        batch = Gate(rows[None], columns, limit, limit if both_ways else None)
        if further is None:
            return batch, None
        return batch, Gate(rows[None], numerics.normalize(further.detach().to(dtype)), limit)


def check_features(name: str, x: Tensor, length: int, dim: int, device: torch.device) -> None:
    """ValueError unless x is floating-point [length, dim] on `device`."""
    if not x.is_floating_point() or x.shape != (length, dim) or x.device != device:
        raise ValueError(f"{name} must be floating-point [{length}, {dim}] on {device}; got {describe(x)}.")
