"""The forward of the row statistics: one sweep over tiles, then one launch that merges its partial results.

Sizes follow from shapes alone. A large problem of one set is swept as a triangle (triton_kernels/row_stats_forward.py);
partial results of the columns that exceed the workspace are merged after each of several launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem.problem import Problem, Statistics
from . import launch, replay
from . import pairs as triton_pairs
from .gradient import Term, Weights, total

TRIANGLE_FROM = 0.25  # tiles of rows for each processor, from which on one set is swept as a triangle
MERGE_BLOCK, MERGED_AT_ONCE = 128, 16  # anchors of a program that merges partial results, partials it reads at once


class Partials(NamedTuple):
    """Partial results of anchors, [slots, parts, anchors], as triton_kernels/merge.py adds them up.

    Slots from `of_tiles` on are of one tile of rows each, the first of tile `first_tile`. triangle > 0: of that many
    rows, and without anything about the anchors up to the end of the tile.
    """

    slots: Tensor
    of_tiles: int
    first_tile: int = 0
    triangle: int = 0

    @property
    def arguments(self) -> tuple[Tensor, int, int]:
        return self.slots, len(self.slots), self.of_tiles


class Forward:
    """The launches of one forward call: `run` makes statistics, the short road takes `partials` itself.

    parts      which numbers a partial result has, merge.Parts
    exponents  those of the problem and, for diagnostics, twice the first
    """

    def __init__(
        self,
        problem: Problem,
        columns: bool,
        means: bool = False,
        diagnostics: bool = False,
        maximum: bool = False,
    ):
        self.problem, self.pairs, self.means, self.maximum = problem, problem.pairs, means, maximum
        self.u, self.v = launch.operands(problem)
        self.rows, self.cols = triton_pairs.sides(problem, self.u, self.v)
        self.n, self.m, self.d = len(self.u), len(self.v), problem.u.shape[1]
        resident = self.d <= launch.kernels().configs.RESIDENT_FEATURES
        self.fused_means = means and len(problem.exponents) == 1 and resident
        # the mean costs a second product and an accumulator like those of the backward
        mask = triton_pairs.costliest_rule(self.pairs)
        counted = mask != "images"
        mask = "ids" if diagnostics and not counted else mask  # as many counters
        direction = "backward" if self.fused_means else "forward"
        self.config = launch.config_of(
            direction, self.u, mask, exponents=len(problem.exponents), products=problem.products
        )
        self.tiles = launch.cdiv(self.n, self.config.block_m)
        # half the products for column sums in every tile
        enough = self.tiles >= TRIANGLE_FROM * launch.processors(self.u.device)
        self.triangle = problem.one_set and not means and enough
        self.columns = columns or self.triangle
        self.exponents = problem.exponents + ((2 * problem.exponents[0],) if diagnostics else ())
        # a fused mean rounds exponentials to the operand dtype: at most 1, by the running maximum
        online = self.fused_means or maximum
        limit = launch.kernels().online_lse.MAX_PLAIN.value
        shift = "online" if online else launch.shift_of(problem, self.exponents, limit)
        has_shift = shift != "plain"
        number = has_shift + len(self.exponents) + counted + 2 * diagnostics
        self.parts = launch.kernels().merge.Parts(number, has_shift, counted, diagnostics)
        scale, scale_is_tensor = launch.scale_argument(problem)
        self.operands = (*launch.operand_arguments(self.config, self.u, self.v, problem.products), scale)
        self.sweep_arguments: dict[str, Any] = {
            **triton_pairs.arguments(self.pairs, self.rows, self.cols, row_anchors=True, col_anchors=self.columns),
            **{"EXPONENTS": self.exponents, "LARGEST": max(self.exponents), "SHIFT": shift},
            **{"SCALE_IS_TENSOR": scale_is_tensor, "PARTS": self.parts},
            **{"COLUMNS": self.columns, "TRIANGLE": self.triangle, "MEANS": self.fused_means},
            **launch.tile_arguments(self.config, self.u, problem.products),
        }

    def run(self) -> Statistics:
        with launch.on_device(self.u.device):
            row_partials, col_partials, mean_partials = self.partials()
            lse, aux = self._finish(row_partials, self._candidates_of_rows())
            col_lse, col_aux, mean = self._empty(0), self._empty(0), self._empty(0)
            if col_partials is not None:
                col_lse, col_aux = self._finish(col_partials, self._candidates_of_columns())
            if mean_partials is not None:
                mean = self._merge_means(row_partials.slots, mean_partials)
            elif self.means:
                mean = self._means_by_weights(lse)
        return Statistics(lse, aux, col_lse, col_aux, mean)

    def partials(self) -> tuple[Partials, Partials | None, Tensor | None]:
        """Sweep: partial results of the rows, those of the columns, and of the means."""
        at_once, num_parts = max(1, self.tiles), self.parts.number
        if self.columns:
            bytes_of_tile = num_parts * self.m * self.problem.stats_dtype.itemsize
            at_once = min(at_once, max(1, launch.WORKSPACE_BYTES // max(1, bytes_of_tile)))
        # a triangle's rows differ in length: smaller pieces fill the gaps, of which every launch leaves some at its end
        pieces = 2 if not self.triangle else 4 if at_once >= self.tiles else 16
        programs = pieces * launch.processors(self.u.device)
        splits, span = launch.split(at_once, self.m, self.config.block_n, programs)
        mean_partials = self._empty(splits, self.n, self.d) if self.fused_means else None
        if not self.columns:
            rows = self._empty(splits, num_parts, self.n)
            self._sweep(0, (self.tiles, splits), span, rows, None, mean_partials)
            return Partials(rows, splits), None, mean_partials
        # [splits of a triangle's rows, what earlier launches found, tiles of rows]
        own, carried = splits if self.triangle else 0, int(at_once < self.tiles)
        of_tiles, block = own + carried, self.config.block_m if self.triangle else 0
        slots = self._empty(of_tiles + at_once, num_parts, self.m)
        rows = slots[:splits] if self.triangle else self._empty(splits, num_parts, self.n)
        for first in range(0, max(1, self.tiles), at_once):
            count = min(at_once, self.tiles - first)
            self._sweep(first, (count, splits), span, rows, slots[of_tiles:], mean_partials)
            if first + count < self.tiles:
                known = own if first else of_tiles
                here = Partials(slots[known : of_tiles + count], of_tiles - known, first, block)
                self._merge(here, slots[own], None, (0, 0, 0, 0), finish=False)
        found = Partials(slots[: of_tiles + count], of_tiles, first, block)
        return (found, None, None) if self.triangle else (Partials(rows, splits), found, None)

    def _empty(self, *shape: int) -> Tensor:
        return self.problem.u.new_empty(shape, dtype=self.problem.stats_dtype)

    def _sweep(self, first_tile, grid, span, row_partials, col_partials, mean_partials) -> None:
        replay.start(
            launch.kernels().row_stats_forward.row_stats_forward_kernel, grid,
            *self.operands, row_partials, col_partials, mean_partials, first_tile=first_tile, span=span,
            **self.sweep_arguments,
        )  # fmt: skip

    def _candidates_of_rows(self) -> tuple[int, int, int, int]:
        """(candidates, those of the same image, first anchor and number of anchors that have the latter)"""
        pairs = self.pairs
        return self.m, pairs.num_rows // pairs.num_images if pairs.num_images else 0, 0, self.n

    def _candidates_of_columns(self) -> tuple[int, int, int, int]:
        pairs = self.pairs
        same_image = pairs.num_rows // pairs.num_images if pairs.num_images else 0
        return self.n, same_image, pairs.positive_offset, pairs.num_rows

    def _finish(self, partials: Partials, candidates: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """lse and aux of anchors."""
        anchors = partials.slots.shape[-1]
        lse = self._empty(len(self.problem.exponents), anchors)
        aux = self._empty(4 if self.parts.diagnostics else 2 if self.maximum else 1, anchors)
        self._merge(partials, lse, aux, candidates, finish=True)
        return lse, aux

    def _merge(self, partials: Partials, lse: Tensor, aux: Tensor | None, candidates, finish: bool) -> None:
        anchors = partials.slots.shape[-1]
        replay.start(
            launch.kernels().merge.merge_kernel, (launch.cdiv(anchors, MERGE_BLOCK),),
            *partials.arguments, partials.first_tile, lse, aux, anchors, *candidates, EXPONENTS=self.exponents,
            PARTS=self.parts, TRIANGLE=partials.triangle, MAXIMUM=self.maximum, FINISH=finish, BLOCK=MERGE_BLOCK,
            AT_ONCE=MERGED_AT_ONCE, enable_fp_fusion=True,
        )  # fmt: skip

    def _merge_means(self, row_partials: Tensor, mean_partials: Tensor) -> Tensor:
        mean = self._empty(1, self.n, self.d)
        block, block_d = 32, min(64, launch.feature_block(self.d))
        replay.start(
            launch.kernels().merge.merge_means_kernel, (launch.cdiv(self.n, block), launch.cdiv(self.d, block_d)),
            row_partials, mean_partials, mean, len(row_partials), self.n, D=self.d, BLOCK=block, BLOCK_D=block_d,
            EXPONENTS=self.exponents, PARTS=self.parts, enable_fp_fusion=True,
        )  # fmt: skip
        return mean

    def _means_by_weights(self, lse: Tensor) -> Tensor:
        """Two exponents, or more features than a program holds: the backward's sweep with coefficients 1/beta_k."""
        means = []
        for beta, one_lse in zip(self.problem.exponents, lse.split(1), strict=True):
            term = Term(one_lse.contiguous(), torch.full_like(one_lse, 1 / beta))
            weights = Weights(self.problem, self.rows, self.cols, term, None, (beta,))
            means.append(total(weights.times_columns(times_scale=False)))
        return torch.stack(means)
