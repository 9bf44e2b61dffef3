"""The sweeps of the `triton` backend: how tiles, partial results and workspaces of a call are laid out.

Forward: one kernel over tiles, one that merges its partial results. Backward: one kernel per side, whose weights go
through a bounded workspace where more features come than a program holds. Sizes follow from shapes alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem.problem import Problem, Statistics
from . import launch
from . import pairs as triton_pairs
from .pairs import Side

WORKSPACE_BYTES = 64 << 20  # of column partials in the forward, and of weights up to 512 features
WIDE_FEATURES, WIDE_WORKSPACE_BYTES = 512, 256 << 20  # of weights beyond: fewer, larger library products
TRIANGLE_FROM = 0.25  # tiles of rows for each processor, from which on one set is swept as a triangle
ALIGNED = 64  # columns of stored weights come in multiples
MOST_SPLITS = 4  # of a gradient where one would do for every processor: each is written and read once more
TERMS_BLOCK = 128  # columns of a program that makes their terms, and what those are padded to: at least any tile's
MERGE_BLOCK, MERGED_AT_ONCE = 128, 16  # anchors of a program that merges partial results, partials it reads at once


class Term(NamedTuple):
    """One direction of the weights: exp(beta_k s - lse_k) times the coefficient of lse_k, and omega where ranked.

    columns  what a tile reads of these anchors as columns, [2 K, padded], where it is made already
    """

    lse: Tensor
    grad: Tensor
    ranks: Ranks | None = None
    columns: Tensor | None = None


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
        self.problem, self.pairs, self.means = problem, problem.pairs, means
        self.u, self.v = launch.operands(problem)
        self.rows, self.cols = triton_pairs.sides(problem, self.u, self.v)
        self.n, self.m, self.d = len(self.u), len(self.v), self.u.shape[1]
        resident = self.d <= launch.kernels().configs.RESIDENT_FEATURES
        self.fused_means = means and len(problem.exponents) == 1 and resident
        # the mean costs a second product and an accumulator like those of the backward
        mask = triton_pairs.costliest_rule(self.pairs)
        counted = mask != "images"
        mask = "ids" if diagnostics and not counted else mask  # as many counters
        direction = "backward" if self.fused_means else "forward"
        self.config = launch.config_of(direction, self.u, mask, exponents=len(problem.exponents))
        self.tiles_of = launch.tiles_of(self.config, self.u, self.v)
        self.tiles = launch.cdiv(self.n, self.config.block_m)
        # half the products for column sums in every tile
        enough = self.tiles >= TRIANGLE_FROM * launch.processors(self.u.device)
        self.triangle = problem.one_set and not means and enough
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
        anchors = {"row_anchors": True, "col_anchors": columns or self.triangle}
        chunk = launch.guide_chunk(self.u.device)
        self.rules = triton_pairs.arguments(self.pairs, self.rows, self.cols, **anchors, guide_chunk=chunk)

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
            bytes_of_tile = num_parts * self.m * self.problem.stats_dtype.itemsize
            at_once = min(at_once, max(1, WORKSPACE_BYTES // max(1, bytes_of_tile)))
        # a triangle's rows differ in length: smaller pieces fill the gaps, of which every launch leaves some at its end
        pieces = 2 if not self.triangle else 4 if at_once >= self.tiles else 16
        programs = pieces * launch.processors(self.u.device)
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
            *self.tiles_of, scale, row_partials, col_partials, mean_partials, self.n, self.m, first_tile, span,
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
            weights = Weights(self.problem, self.rows, self.cols, term, None, (beta,))
            means.append(total(weights.times_columns(times_scale=False)))
        return torch.stack(means)


def total(splits: Tensor) -> Tensor:
    """[splits, rows, D] -> [rows, D]."""
    return splits[0] if len(splits) == 1 else splits.sum(0)


def gradients(
    problem: Problem, row_term: Term | None, col_term: Term | None, need_u: bool = True, need_v: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dL/du and dL/dv in splits, [splits, rows, D]; du holds both directions when there is one set."""
    rows, cols = triton_pairs.sides(problem, *launch.operands(problem))
    if problem.one_set:
        col_term, need_v = row_term, False
    if need_u and (need_v or problem.one_set) and problem.u.shape[1] > launch.kernels().configs.RESIDENT_FEATURES:
        return Weights(problem, rows, cols, row_term, col_term).times_both()
    du = Weights(problem, rows, cols, row_term, col_term).times_columns() if need_u else None
    dv = Weights(problem, cols, rows, col_term, row_term).times_columns() if need_v else None
    return du, dv


def shift_of_weights(problem: Problem, exponents: tuple[float, ...], both_directions: bool) -> str:
    """How the exponentials of weights are kept in range: one for both directions, or one less lse for each."""
    if not both_directions:
        return "online"
    return launch.shift_of(problem, exponents, launch.kernels().row_stats_backward.MAX_FACTORED.value)


class Weights:
    """The weights w_ij of a backward, rows against columns, and their products; see row_stats_backward.py."""

    def __init__(
        self,
        problem: Problem,
        rows: Side,
        cols: Side,
        row_term: Term | None,
        col_term: Term | None,
        exponents: tuple[float, ...] | None = None,
    ):
        self.problem, self.rows, self.cols, self.exponents = problem, rows, cols, exponents or problem.exponents
        (self.n, self.d), self.m = rows.x.shape, len(cols.x)
        self.like = problem.u.new_empty(0, dtype=problem.stats_dtype)
        term = row_term or col_term
        ranks = term.ranks if term else None
        mask = triton_pairs.costliest_rule(problem.pairs)
        self.config = launch.config_of("backward", rows.x, mask, ranks is not None, len(self.exponents))
        # omega differs by direction: nothing to factor
        shift = shift_of_weights(problem, self.exponents, row_term is not None and col_term is not None and not ranks)
        self.found = [term for term in (row_term, col_term) if term is not None]
        self.scale, self.scale_is_tensor = launch.scale_argument(problem)
        self.terms: Tensor | None = None
        power: Tensor | None = None
        if col_term is not None:
            self.terms, power = self._column_terms(col_term, row_term, shift)
        self.vectors = (*(row_term or (None, None))[:2], self.terms, col_term and col_term.grad, power)
        self.vectors += (*_table_of(row_term), *_table_of(col_term), ranks and ranks.shape)
        anchors = {"row_anchors": row_term is not None, "col_anchors": col_term is not None}
        chunk = launch.guide_chunk(rows.x.device)
        self.flags = triton_pairs.arguments(problem.pairs, rows, cols, **anchors, guide_chunk=chunk)
        self.flags |= {"SHIFT": shift, "LARGEST": max(self.exponents), "EXPONENTS": self.exponents}
        self.flags |= {"FORWARD": row_term is not None, "REVERSE": col_term is not None}
        self.flags |= {"BINS": ranks.bins if ranks else 0} | launch.tile_arguments(self.config, rows.x)
        self.tiles_of = launch.tiles_of(self.config, rows.x, cols.x)

    def _column_terms(self, term: Term, row_term: Term | None, shift: str) -> tuple[Tensor, Tensor | None]:
        """What every tile reads of its columns, made once, and the power of two in it: see column_terms_kernel."""
        if term.columns is not None:
            return term.columns, None
        blocks = launch.cdiv(self.m, TERMS_BLOCK)
        terms = self.like.new_empty(2 * len(self.exponents), blocks * TERMS_BLOCK)
        power = None if shift == "online" else self.like.new_empty(1)
        other = None if row_term is None or row_term.grad is term.grad else row_term.grad
        launch.kernels().row_stats_backward.column_terms_kernel[(blocks,)](
            term.lse, term.grad, other, self.scale, terms, power, self.m, self.n, terms.stride(0),
            EXPONENTS=self.exponents, LARGEST=max(self.exponents), SHIFT=shift, SCALE_IS_TENSOR=self.scale_is_tensor,
            BLOCK=TERMS_BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
        return terms, power

    def times_columns(self, times_scale: bool = True) -> Tensor:
        """[scale] sum_j w_ij cols_j for every row, [splits, rows, D]."""
        if self.config.block_d == 0:
            tiles = launch.cdiv(self.n, self.config.block_m)
            fewest = max(1, launch.processors(self.like.device) // max(1, tiles))
            most = min(MOST_SPLITS, WORKSPACE_BYTES // max(1, self.n * self.d * self.like.element_size()))
            at_once = launch.programs_at_once(self.config, self.rows.x)
            splits, span = launch.even_split(tiles, self.m, self.config.block_n, fewest, most, at_once)
            out = self.like.new_empty(splits, self.n, self.d)
            self._sweep((0, self.n), (0, self.m), splits, span, out, self.like.new_empty(0), times_scale)
            return out
        out = self.like.new_empty(self.n, self.d)
        width = launch.cdiv(max(1, self.m), self._unit) * self._unit
        height = max(1, self._budget() // width // self.config.block_m) * self.config.block_m
        for (begin, end), _, weights, undo in self._stored(height, width, times_scale):
            torch.mul(_product(weights, self.cols.x), undo, out=out[begin:end])
        return out[None]

    def times_both(self) -> tuple[Tensor, Tensor | None]:
        """scale sum_j w_ij cols_j and scale sum_i w_ij rows_i, [1, rows, D] and [1, columns, D], from the same weights.

        Saves the second score product and pays for it with sums in memory: blocks of weights are squares, so that
        those are a small part however many rows there are. One set: w_ij = w_ji, the blocks on and above the diagonal
        make the whole gradient, which is the first result.
        """
        du, dv = self.like.new_zeros(self.n, self.d), None
        if not self.problem.one_set:
            dv = self.like.new_zeros(self.m, self.d)
        by_columns, largest_undo = du if dv is None else dv, self._largest_undo()
        side = max(1, math.isqrt(self._budget()) // self._unit) * self._unit
        for (begin, end), (first, last), weights, undo in self._stored(side, side, times_scale=False):
            du[begin:end].addcmul_(_product(weights, self.cols.x[first:last]), undo)
            if dv is None and first == begin:
                continue
            x = self.rows.x[begin:end]
            x = x if largest_undo is None else (x * (undo / largest_undo)).to(x.dtype)
            transposed = _product(weights.T, x)
            by_columns[first:last] += transposed if largest_undo is None else transposed.mul_(largest_undo)
        du.mul_(self.problem.scale)
        return du[None], None if dv is None else dv.mul_(self.problem.scale)[None]

    def _budget(self) -> int:
        """Weights that may be stored at a time."""
        limit = WORKSPACE_BYTES if self.d <= WIDE_FEATURES else WIDE_WORKSPACE_BYTES
        return limit // self.rows.x.element_size()

    @property
    def _unit(self) -> int:
        """Rows and columns of blocks of stored weights come in multiples."""
        return max(ALIGNED, self.config.block_m, self.config.block_n)

    def _stored(self, height: int, width: int, times_scale: bool):
        """((begin, end) of rows, of columns, weights, what undoes their scaling [rows, 1]), block after block.

        One set in blocks that do not hold whole rows: only those on and above the diagonal.
        """
        height, width = (
            min(size, launch.cdiv(n, self._unit) * self._unit) for size, n in ((height, self.n), (width, self.m))
        )
        stored, undo = self.rows.x.new_empty(height, width), self.like.new_empty(height, 1)
        for begin in range(0, self.n, height):
            for first in range(begin if self.problem.one_set and width < self.m else 0, self.m, width):
                end, last = min(begin + height, self.n), min(first + width, self.m)
                tiles = launch.cdiv(end - begin, self.config.block_m)
                programs = 4 * launch.processors(self.like.device)
                splits, span = launch.split(tiles, last - first, self.config.block_n, programs)
                self._sweep((begin, end), (first, last), splits, span, stored, undo, times_scale)
                yield (begin, end), (first, last), stored[: end - begin, : last - first], undo[: end - begin]

    def _sweep(self, rows, columns, splits: int, span: int, out: Tensor, undo: Tensor, times_scale: bool) -> None:
        tiles = launch.cdiv(rows[1] - rows[0], self.config.block_m)
        stride_terms = 0 if self.terms is None else self.terms.stride(0)
        launch.kernels().row_stats_backward.row_stats_backward_kernel[tiles, splits](
            *self.tiles_of, self.scale, *self.vectors, out, undo, self.n, self.m, rows[0], *columns, span,
            self.rows.x.stride(0), self.cols.x.stride(0), stride_terms, out.stride(-2),
            SCALE_IS_TENSOR=self.scale_is_tensor, TIMES_SCALE=times_scale, **self.flags,
        )  # fmt: skip

    def _largest_undo(self) -> Tensor | None:
        """What undoes the scaling of the row whose fp16 weights are scaled up the least; None: nothing is scaled."""
        if self.rows.x.dtype != torch.float16:
            return None
        bounds = torch.stack([
            beta * term.grad[k].abs().amax() for term in self.found for k, beta in enumerate(self.exponents)
        ])  # fmt: skip
        exponent = launch.kernels().row_stats_backward.FP16_EXPONENT.value - bounds.sum().log2().ceil()
        return exponent.clamp(-100, 100).neg().exp2()


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
