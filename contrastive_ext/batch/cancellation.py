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
    margin    finite: the limit is, with c the positive's cosine, c - margin, or with `relative` c - |c| margin; columns
              at the limit, up to rounding, are kept. Below 0 the limit is above the positive

    `Guide.own(margin=-0.1)` is the batch's own unit rows, of the queue and of explicit negatives too. A positive is
    never cancelled: it is no candidate.
    """

    g1: Tensor | None
    g2: Tensor | None
    margin: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.is_own:
            check_tensor("guide[0]", self.g1)
            check_tensor("guide[1]", self.g2)
        check_number("margin", self.margin)
        if not abs(self.margin) < float("inf"):
            raise ValueError(f"margin must be finite; got {self.margin}.")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative must be True or False; got {self.relative!r:.60}.")

    @staticmethod
    def own(margin: float = 0.0, relative: bool = False) -> Guide:
        """The rows of the call itself as their guide, detached and of unit length."""
        return Guide(None, None, margin, relative)

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
        for at, g in enumerate(given):
            check_tensor(f"guide[{at}]", g)
        return Guide(*given)

    @property
    def is_own(self) -> bool:
        return self.g1 is None and self.g2 is None

    def swapped(self) -> Guide:
        """The same where z1 and z2 change places."""
        return replace(self, g1=self.g2, g2=self.g1)

    def of_pairs(self, batch: int) -> Guide:
        """The same where z2 ends with the last of `batch` pairs."""
        return self if self.g2 is None else replace(self, g2=self.g2[:batch])

    def check(self, z1: Tensor, z2: Tensor) -> None:
        """ValueError unless it fits a batch z1, z2."""
        dtype = numerics.stats_dtype(z1.dtype)
        if abs(self.margin) > torch.finfo(dtype).max:
            raise ValueError(f"margin must be finite in {dtype}; got {self.margin}.")
        if self.g1 is not None and self.g2 is not None:
            dim = self.g1.shape[-1] if self.g1.dim() else 0
            check_features("guide[0]", self.g1, (z1.shape[0], dim), z1.device)
            check_features("guide[1]", self.g2, (z2.shape[0], dim), z1.device)

    def judge(self, u1: Tensor, u2: Tensor, positive: Tensor | None) -> Judgement:
        """Features and limits for rows u1 [B, D], u2 [M, D]; positive [B] names partners in u2, None: the first B."""
        given = (u1, u2) if self.g1 is None or self.g2 is None else (self.g1, self.g2)
        g1, g2 = (_unit(g, u1.dtype) for g in given)
        partner = g2[: g1.shape[0]] if positive is None else g2[positive]
        cosine = (g1 * partner).sum(1)
        below = cosine.abs() * self.margin if self.relative else self.margin
        return Judgement(g1, g2, cosine - below + numerics.rounding_of_products(u1.dtype, g1.shape[1]))

    def features(self, columns: Tensor, given: Tensor | None) -> Tensor | None:
        """[K, E] of further columns [K, D], or None where nothing is known of them."""
        if self.is_own:
            return _unit(columns, columns.dtype)
        return None if given is None else _unit(given, columns.dtype)


@dataclass(frozen=True)
class Judgement:
    """Unit features of z1 [B, E] and z2 [M, E], and the limit of every pair [B]."""

    g1: Tensor
    g2: Tensor
    limit: Tensor

    def gate(self, rows: Tensor, columns: Tensor, col_limit: Tensor | None = None) -> Gate:
        """The gate of rows [A, E], views of the pairs one after the other, against columns [M, E]."""
        return Gate(rows[None], columns, self.limit.repeat(rows.shape[0] // self.limit.shape[0]), col_limit)


def _unit(features: Tensor, dtype: torch.dtype) -> Tensor:
    return numerics.normalize(features.detach().to(dtype))


def check_features(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """ValueError unless x is floating-point of `shape` on `device`."""
    if not x.is_floating_point() or x.shape != shape or x.device != device:
        raise ValueError(f"{name} must be floating-point {list(shape)} on {device}; got {describe(x)}.")
