"""Detected false negatives: the columns too similar to an image, as short lists or, where lists have no end, as limits.

    score_gj = max_s (or mean_s) <scorers_gs, column_j>
    F_g = {j of another image: among the top k scores and/or score > threshold}

With `top_k` the false negatives are lists, [G, k] per set of columns. A threshold alone may detect any number of
columns, so nothing is stored: a `Gate` asks again wherever a tile is visited. Both are constants of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from ..operators.top_columns import merge, top_columns
from ..problem.pairs import NO_COLUMN, Gate, Pairs

BLOCK = 1024  # images and columns of a tile where a threshold is asked again

_library = torch.library.Library("contrastive_ext", "FRAGMENT")
_library.define(
    "detected_sum(Tensor values, Tensor scorers, Tensor features, float limit, SymInt num_images, Tensor? col_ids, "
    "Tensor? row_labels, Tensor? col_labels, bool of_images) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class Candidates:
    """One set of columns: features [M, E], ids [M] (UNFILLED: nobody's candidate); num_images > 0: see pairs.py.

    are_scorers  features are those of the scorers, row s G + g scorers[s, g]: one set
    """

    features: Tensor
    num_images: int = 0
    ids: Tensor | None = None
    are_scorers: bool = False


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
    candidates = sum(s.features.shape[0] for s in sets)
    # lists longer than the columns are right as well: no reason to bind a graph to the size of its batch
    if top_k is None or (not torch.compiler.is_compiling() and top_k >= candidates):
        limit = -torch.inf if threshold is None else threshold
        return Limits(tuple(sets), scorers, limit, views)
    found, before = None, 0
    for one in sets:
        features = None if one.are_scorers else one.features
        best = top_columns(scorers, features, top_k, num_images=one.num_images, col_ids=one.ids, backend=backend)
        found = best if found is None else merge(found, best, before)
        before += one.features.shape[0]
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
            end = begin + one.features.shape[0]
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
        return _DetectedSum.apply(values, *self._asked(at))

    def count(self, at: int, row_labels: Tensor | None = None, col_labels: Tensor | None = None) -> Tensor:
        ones = self.scorers.new_ones(self.sets[at].features.shape[0], 1)
        return _detected_sum(ones, *self._asked(at), row_labels, col_labels)[:, 0].long()

    def _asked(self, at: int) -> tuple[Tensor, Tensor, float, int, Tensor | None]:
        one = self.sets[at]
        return self.scorers, one.features, self.limit, one.num_images, one.ids


def _detected_sum(
    values: Tensor, scorers, features, limit, num_images, col_ids, row_labels=None, col_labels=None, of_images=False
) -> Tensor:
    """[G, D] sum over every image's false negatives of values [M, D]; `of_images`: the transpose, [M, D] of [G, D].

    One operator, so that a graph does not unroll the tiles and with them the size of its batch.
    """
    return torch.ops.contrastive_ext.detected_sum.default(
        values, scorers, features, limit, num_images, col_ids, row_labels, col_labels, of_images
    )


class _DetectedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, scorers: Tensor, features: Tensor, limit: float, num_images: int, col_ids):
        ctx.save_for_backward(scorers, features, col_ids)  # asked again: autograd must see a change
        ctx.rule = limit, num_images
        return _detected_sum(values, scorers, features, limit, num_images, col_ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        scorers, features, col_ids = ctx.saved_tensors
        limit, num_images = ctx.rule
        spread = _detected_sum(grad, scorers, features, limit, num_images, col_ids, of_images=True)
        return spread, None, None, None, None, None


def _sum_tiles(values, scorers, features, limit, num_images, col_ids, row_labels, col_labels, of_images) -> Tensor:
    images, m = scorers.shape[1], features.shape[0]
    gate = Gate(scorers, features, scorers.new_full((images,), limit))
    others = Pairs(m, m, num_images, col_ids=col_ids, device=scorers.device)
    total = values.new_zeros(m if of_images else images, values.shape[1])
    with torch._C._DisableAutocast():  # a backward may be called inside it
        for rows, cols in product(_blocks(images), _blocks(m)):
            detected, other = gate.cancels(rows, cols), others.keep(rows, cols)
            if other is not None:
                detected &= other
            if row_labels is not None:
                detected &= row_labels[rows, None] == col_labels[None, cols]
            weight = detected.to(values.dtype)
            if of_images:
                total[cols] += weight.T @ values[rows]
            else:
                total[rows] += weight @ values[cols]
    return total


def _blocks(size: int) -> list[slice]:
    return [slice(begin, min(begin + BLOCK, size)) for begin in range(0, size, BLOCK)]


def _shape_of_sum(values, scorers, features, limit, num_images, col_ids, row_labels, col_labels, of_images) -> Tensor:
    return values.new_empty(features.shape[0] if of_images else scorers.shape[1], values.shape[1])


_library.impl("detected_sum", _sum_tiles, "CompositeExplicitAutograd")
torch.library.register_fake("contrastive_ext::detected_sum", _shape_of_sum, lib=_library)
