"""The sweeps of the `triton` backend: how tiles, partial results and workspaces of a call are laid out.

Forward: one kernel over tiles, one that merges its partial results. Backward: one kernel per side, whose weights go
through a bounded workspace where more features come than a program holds. Sizes follow from shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, Statistics
from . import triton_launch as launch
from . import triton_pairs
from .triton_pairs import Side

WORKSPACE_BYTES = 64 << 20  # of column partials in the forward, and of weights up to 512 features
WIDE_WORKSPACE_BYTES = 256 << 20  # of weights beyond: fewer, larger library products
MERGE_BLOCK, MERGED_AT_ONCE = 128, 16  # anchors of a program that merges partial results, partials it reads at once


class Term(NamedTuple):
    """One direction of the weights: exp(beta_k s - lse_k) times the coefficient of lse_k, and omega where ranked."""

    lse: Tensor
    grad: Tensor
    ranks: Ranks | None = None


class Ranks(NamedTuple):
    """Histograms of the anchors and the four numbers that turn a rank into a weight."""

    bins: int
    axis: Tensor
    below: Tensor
    shape: Tensor


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
    """The launches of one forward call."""

    def __init__(self, problem: Problem, columns: bool, means: bool = False, diagnostics: bool = False, maximum=False):
        self.problem, self.pairs, self.columns, self.means = problem, problem.pairs, columns, means
        self.u, self.v = launch.operands(problem)
        self.rows, self.cols = triton_pairs.sides(problem, self.u, self.v)
        self.n, self.m, self.d = len(self.u), len(self.v), self.u.shape[1]
        resident = self.d <= launch.kernels().configs.RESIDENT_FEATURES
        self.fused_means = means and len(problem.exponents) == 1 and resident
        # the mean costs a second product and an accumulator like those of the backward
        mask = triton_pairs.costliest_rule(self.pairs)
        counted = mask != "images"
        mask = "ids" if diagnostics and not counted else mask  # as many counters
        self.config = launch.config_of("backward" if self.fused_means else "forward", self.u, mask)
        self.tiles = launch.cdiv(self.n, self.config.block_m)
        # half the products, once tiles of rows alone occupy the device
        self.triangle = problem.one_set and not means and self.tiles >= launch.processors(self.u.device)
        exponents = problem.exponents + ((2 * problem.exponents[0],) if diagnostics else ())
        # a fused mean rounds exponentials to the operand dtype: at most 1, by the running maximum
        online = self.fused_means or maximum
        shift = "online" if online else launch.shift_of(problem, exponents, launch.kernels().online_lse.MAX_PLAIN.value)
        has_shift = shift != "plain"
        num_parts = has_shift + len(exponents) + counted + 2 * diagnostics
        self.flags: dict[str, Any] = {"EXPONENTS": exponents, "NUM_PARTS": num_parts}
        self.sweep_flags = self.flags | {"SHIFT": shift, "LARGEST": max(exponents), "DIAGNOSTICS": diagnostics}
        self.sweep_flags |= {"COLUMNS": columns or self.triangle, "TRIANGLE": self.triangle, "MEANS": self.fused_means}
        self.flags["HAS_SHIFT"] = has_shift
        self.merge_flags = self.flags | {"COUNTED": counted, "DIAGNOSTICS": diagnostics, "MAXIMUM": maximum}
        self.rules = triton_pairs.arguments(
            self.pairs,
            self.rows,
            self.cols,
            row_anchors=True,
            col_anchors=columns or self.triangle,
            guide_chunk=launch.guide_chunk(self.u.device),
        )

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
        at_once, num_parts = max(1, self.tiles), self.flags["NUM_PARTS"]
        if self.sweep_flags["COLUMNS"]:
            at_once = min(at_once, max(1, WORKSPACE_BYTES // max(1, self._empty(num_parts, self.m).nbytes)))
        # a triangle's rows differ in length: smaller pieces fill the gaps
        programs = (4 if self.triangle else 2) * launch.processors(self.u.device)
        splits, span = launch.split(at_once, self.m, self.config.block_n, programs)
        mean_partials = self._empty(splits, self.n, self.d) if self.fused_means else None
        if not self.sweep_flags["COLUMNS"]:
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
        scale, scale_is_tensor = launch.scale_argument(self.problem)
        launch.kernels().row_stats_forward.row_stats_forward_kernel[grid](
            self.u, self.v, scale, row_partials, col_partials, mean_partials, self.n, self.m, first_tile, span,
            self.u.stride(0), self.v.stride(0), SCALE_IS_TENSOR=scale_is_tensor, **self.rules, **self.sweep_flags,
            **launch.tile_arguments(self.config, self.u),
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
        aux = self._empty(4 if self.merge_flags["DIAGNOSTICS"] else 2 if self.merge_flags["MAXIMUM"] else 1, anchors)
        self._merge(partials, lse, aux, candidates, finish=True)
        return lse, aux

    def _merge(self, partials: Partials, lse: Tensor, aux: Tensor | None, candidates, finish: bool) -> None:
        anchors = partials.slots.shape[-1]
        launch.kernels().merge.merge_kernel[(launch.cdiv(anchors, MERGE_BLOCK),)](
            *partials.arguments, partials.first_tile, lse, aux, anchors, *candidates, FINISH=finish,
            TRIANGLE=partials.triangle, BLOCK=MERGE_BLOCK, AT_ONCE=MERGED_AT_ONCE, enable_fp_fusion=True,
            **self.merge_flags,
        )  # fmt: skip

    def _merge_means(self, row_partials: Tensor, mean_partials: Tensor) -> Tensor:
        mean = self._empty(1, self.n, self.d)
        block, block_d = 32, min(64, launch.feature_block(self.d))
        launch.kernels().merge.merge_means_kernel[(launch.cdiv(self.n, block), launch.cdiv(self.d, block_d))](
            row_partials, mean_partials, mean, len(row_partials), self.n, D=self.d, BLOCK=block, BLOCK_D=block_d,
            EXPONENTS=self.flags["EXPONENTS"], NUM_PARTS=self.flags["NUM_PARTS"], enable_fp_fusion=True,
        )  # fmt: skip
        return mean

    def _means_by_weights(self, lse: Tensor) -> Tensor:
        """Two exponents, or more features than a program holds: the backward's sweep with coefficients 1/beta_k."""
        means = []
        for beta, one_lse in zip(self.problem.exponents, lse.split(1), strict=True):
            term = Term(one_lse.contiguous(), torch.full_like(one_lse, 1 / beta))
            splits = weighted_columns(self.problem, self.rows, self.cols, term, None, (beta,), times_scale=False)
            means.append(total(splits))
        return torch.stack(means)


def total(splits: Tensor) -> Tensor:
    """[splits, rows, D] -> [rows, D]."""
    return splits[0] if len(splits) == 1 else splits.sum(0)


def weighted_columns(
    problem: Problem,
    rows: Side,
    cols: Side,
    row_term: Term | None,
    col_term: Term | None,
    exponents: tuple[float, ...] | None = None,
    times_scale: bool = True,
) -> Tensor:
    """[scale] sum_j w_ij cols_j for every row, [splits, rows, D]; see triton_kernels/row_stats_backward.py."""
    exponents = exponents or problem.exponents
    term = row_term or col_term
    ranks = term.ranks if term else None
    config = launch.config_of("backward", rows.x, triton_pairs.costliest_rule(problem.pairs), ranked=ranks is not None)
    (n, d), m, like = rows.x.shape, len(cols.x), problem.u.new_empty(0, dtype=problem.stats_dtype)
    both = row_term is not None and col_term is not None
    scale, scale_is_tensor = launch.scale_argument(problem)
    shift = "online"
    if both and not ranks:  # each direction of ranks has its own omega: nothing to factor
        shift = launch.shift_of(problem, exponents, launch.kernels().row_stats_backward.MAX_FACTORED.value)
    terms = (*(row_term or (None, None))[:2], *(col_term or (None, None))[:2])
    tables = (*_table_of(row_term), *_table_of(col_term), ranks and ranks.shape)
    anchors = {"row_anchors": row_term is not None, "col_anchors": col_term is not None}
    rules = triton_pairs.arguments(problem.pairs, rows, cols, **anchors, guide_chunk=launch.guide_chunk(rows.x.device))

    def sweep(row_begin: int, grid: tuple[int, int], span: int, out: Tensor, undo: Tensor) -> None:
        launch.kernels().row_stats_backward.row_stats_backward_kernel[grid](
            rows.x, cols.x, scale, *terms, *tables, out, undo, n, m, row_begin, span, rows.x.stride(0),
            cols.x.stride(0), out.stride(-2), SHIFT=shift, LARGEST=max(exponents), EXPONENTS=exponents,
            SCALE_IS_TENSOR=scale_is_tensor, FORWARD=row_term is not None, REVERSE=col_term is not None,
            TIMES_SCALE=times_scale, BINS=ranks.bins if ranks else 0, **rules, **launch.tile_arguments(config, rows.x),
        )  # fmt: skip

    if config.block_d == 0:
        tiles = launch.cdiv(n, config.block_m)
        splits, span = launch.split(tiles, m, config.block_n, launch.processors(like.device))
        out = like.new_empty(splits, n, d)
        sweep(0, (tiles, splits), span, out, like.new_empty(0))
        return out
    out = like.new_empty(n, d)
    width = launch.cdiv(m, 64) * 64  # rows of weights stay aligned
    budget = (WORKSPACE_BYTES if d <= 512 else WIDE_WORKSPACE_BYTES) // (width * rows.x.element_size())
    height = min(launch.cdiv(n, config.block_m), max(1, budget // config.block_m)) * config.block_m
    weights, undo = rows.x.new_empty(height, width), like.new_empty(height, 1)
    for begin in range(0, n, height):
        count = min(height, n - begin)
        tiles = launch.cdiv(count, config.block_m)
        splits, span = launch.split(tiles, m, config.block_n, 4 * launch.processors(like.device))
        sweep(begin, (tiles, splits), span, weights, undo)
        torch.mul(_product(weights[:count, :m], cols.x), undo[:count], out=out[begin : begin + count])
    return out[None]


def _table_of(term: Term | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Axis and counts of a term's histograms, if it has any."""
    return (None, None) if term is None or term.ranks is None else (term.ranks.axis, term.ranks.below)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x, accumulated and returned in at least float32."""
    if weights.dtype in (torch.float16, torch.bfloat16):
        if weights.is_cuda:
            return torch.mm(weights, x, out_dtype=torch.float32)
        return weights.float() @ x.float()
    return weights @ x
