"""Detected false negatives: the columns too similar to an image, as short lists or, where lists have no end, as limits.

    score_gj = max_s (or mean_s) <scorers_gs, column_j>
    F_g = {j of another image: among the top k scores and/or score > threshold}

With `top_k` the false negatives are lists, [G, k] per set of columns. A threshold alone may detect any number of
columns, so nothing is stored: a `Gate` asks again wherever a tile is visited. Both are constants of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .pairs import NO_COLUMN, Gate, Pairs
from .top_columns import merge, top_columns

BLOCK = 1024  # images and columns of a tile where a threshold is asked again


@dataclass(frozen=True)
class Candidates:
    """One set of columns: features [M, E], ids [M] (UNFILLED: nobody's candidate); num_images > 0: see pairs.py."""

    features: Tensor
    num_images: int = 0
    ids: Tensor | None = None


class Detected(Protocol):
    """The false negatives of G images among several sets of columns."""

    def rules(self, at: int) -> dict:
        """Keywords of `row_stats` that ignore them in set `at`."""

    def add_up(self, at: int, values: Tensor) -> Tensor:
        """[G, D] sum over the false negatives in set `at` of values [M, D], differentiable in values."""

    def count(self, at: int, row_labels: Tensor | None = None, col_labels: Tensor | None = None) -> Tensor:
        """[G] number of false negatives in set `at`; with labels [G] and [M] of those with the image's label."""


def detect(
    scorers: Tensor, sets: list[Candidates], top_k: int | None, threshold: float | None, views: int, backend: str
) -> Detected:
    """Find the false negatives of the images that scorers [S, G, E] show; `views` anchors will share each image's."""
    candidates = sum(len(s.features) for s in sets)
    if top_k is None or top_k >= candidates:
        limit = -torch.inf if threshold is None else threshold
        return Limits(tuple(sets), scorers, limit, views)
    found, before = None, 0
    for one in sets:
        best = top_columns(scorers, one.features, top_k, num_images=one.num_images, col_ids=one.ids, backend=backend)
        found = best if found is None else merge(found, best, before)
        before += len(one.features)
    assert found is not None
    columns = found.columns if threshold is None else found.columns.where(found.scores > threshold, NO_COLUMN)
    return Lists.split(columns, sets)


@dataclass(frozen=True)
class Lists:
    """False negatives as columns [G, k] of each set, NO_COLUMN where there are fewer."""

    columns: tuple[Tensor, ...]

    @staticmethod
    def split(columns: Tensor, sets: list[Candidates]) -> Lists:
        """From columns [G, k] numbered through all sets."""
        lists, begin = [], 0
        for one in sets:
            end = begin + len(one.features)
            lists.append((columns - begin).where((columns >= begin) & (columns < end), NO_COLUMN))
            begin = end
        return Lists(tuple(lists))

    def rules(self, at: int) -> dict:
        return {"ignored": self.columns[at]}

    def add_up(self, at: int, values: Tensor) -> Tensor:
        listed = self.columns[at]
        weight = (listed != NO_COLUMN).to(values.dtype)
        return torch.nn.functional.embedding_bag(
            listed.clamp(min=0), values, mode="sum", per_sample_weights=weight
        )  # fmt: skip

    def count(self, at: int, row_labels: Tensor | None = None, col_labels: Tensor | None = None) -> Tensor:
        listed = self.columns[at]
        counted = listed != NO_COLUMN
        if row_labels is not None and col_labels is not None:
            counted &= col_labels[listed.clamp(min=0)] == row_labels[:, None]
        return counted.sum(1)


@dataclass(frozen=True)
class Limits:
    """False negatives as everything above a score; asked again, tile by tile, by whoever needs them."""

    sets: tuple[Candidates, ...]
    scorers: Tensor
    limit: float
    views: int

    def rules(self, at: int) -> dict:
        images = self.scorers.shape[1]
        return {
            "gate": Gate(
                self.scorers, self.sets[at].features, self.scorers.new_full((self.views * images,), self.limit)
            )
        }

    def add_up(self, at: int, values: Tensor) -> Tensor:
        return _AddUp.apply(values, self, at)

    def count(self, at: int, row_labels: Tensor | None = None, col_labels: Tensor | None = None) -> Tensor:
        total = torch.zeros(self.scorers.shape[1], dtype=torch.int64, device=self.scorers.device)
        for images, columns, detected in self.tiles(at):
            if row_labels is not None and col_labels is not None:
                detected = detected & (row_labels[images, None] == col_labels[None, columns])
            total[images] += detected.sum(1)
        return total

    def tiles(self, at: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Images, columns and which of these are false negatives of those, tile by tile."""
        one, images = self.sets[at], self.scorers.shape[1]
        m = len(one.features)
        gate: Gate = self.rules(at)["gate"]
        others = Pairs(m, m, one.num_images, col_ids=one.ids, device=self.scorers.device)
        for i in range(0, images, BLOCK):
            for j in range(0, m, BLOCK):
                rows, cols = slice(i, min(i + BLOCK, images)), slice(j, min(j + BLOCK, m))
                detected, other = gate.cancels(rows, cols), others.keep(rows, cols)
                yield rows, cols, detected if other is None else detected & other


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, limits: Limits, at: int) -> Tensor:
        ctx.limits, ctx.at, ctx.shape = limits, at, values.shape
        total = values.new_zeros(limits.scorers.shape[1], values.shape[1])
        for images, columns, detected in limits.tiles(at):
            total[images] += detected.to(values.dtype) @ values[columns]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        spread = grad.new_zeros(ctx.shape)
        with torch._C._DisableAutocast():  # a product in 16 bits would detect others than the forward did
            for images, columns, detected in ctx.limits.tiles(ctx.at):
                spread[columns] += detected.to(grad.dtype).T @ grad[images]
        return spread, None, None
