"""The gradient of the row statistics: one sweep per side whose tiles are weights times the other side's vectors.

Where more features come than a program holds, weights go through a bounded workspace and a library product finishes the
work. Sizes follow from shapes alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem.problem import Problem
from . import launch, replay
from . import pairs as triton_pairs
from .pairs import Side

ALIGNED = 64  # columns of stored weights come in multiples
MOST_SPLITS = 4  # of a gradient where one would do for every processor: each is written and read once more
TERMS_BLOCK = 128  # columns of a program that makes their terms, and what those are padded to: at least any tile's


class Term(NamedTuple):
    """One direction of the weights: exp(beta_k s - lse_k) times the coefficient of lse_k, and omega where ranked.

    columns  what a tile reads of these anchors as columns, [2 K, padded], where it is made already
    bounds   and for fp16 their largest coefficients, [K]
    sigmoid  of sums over pairs: sigmoid(s - lse) in place of the exponential
    """

    lse: Tensor
    grad: Tensor
    ranks: Ranks | None = None
    columns: Tensor | None = None
    bounds: Tensor | None = None
    sigmoid: bool = False


class Ranks(NamedTuple):
    """Histograms of the anchors and the four numbers that turn a rank into a weight."""

    bins: int
    axis: Tensor
    below: Tensor
    shape: Tensor


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
        self.n, self.m, self.d = len(rows.x), len(cols.x), problem.u.shape[1]
        self.like = problem.u.new_empty(0, dtype=problem.stats_dtype)
        term = row_term or col_term
        ranks = term.ranks if term else None
        mask = triton_pairs.costliest_rule(problem.pairs)
        self.found = [term for term in (row_term, col_term) if term is not None]
        sigmoid = any(term.sigmoid for term in self.found)
        self.config = launch.config_of(
            "backward", rows.x, mask, ranks is not None, len(self.exponents), problem.products, sigmoid
        )
        # omega differs by direction: nothing to factor
        shift = shift_of_weights(problem, self.exponents, row_term is not None and col_term is not None and not ranks)
        forward, reverse = row_term is not None, col_term is not None
        self.scale, self.scale_is_tensor = launch.scale_argument(problem)
        self.operands = (*launch.operand_arguments(self.config, rows.x, cols.x, problem.products), self.scale)
        row_terms = None if row_term is None else (row_term.lse, row_term.grad)
        col_terms: tuple[Any, ...] = (None,) * 3
        if col_term is not None:
            terms, bounds, power = self._column_terms(col_term, row_term, shift)
            col_terms = (terms, terms.stride(0)), bounds, power
        self.terms: tuple[Any, ...] = (*(row_terms or (None, None)), *col_terms)
        self.ranks = None if ranks is None else (_histograms(row_term), _histograms(col_term), ranks.shape)
        self.sweep_arguments: dict[str, Any] = {
            **triton_pairs.arguments(problem.pairs, rows, cols, row_anchors=forward, col_anchors=reverse),
            **{"EXPONENTS": self.exponents, "LARGEST": max(self.exponents), "SHIFT": shift},
            **{"SCALE_IS_TENSOR": self.scale_is_tensor, "FORWARD": forward, "REVERSE": reverse},
            **{"BINS": 0 if ranks is None else ranks.bins, "SIGMOID": sigmoid},
            **launch.tile_arguments(self.config, rows.x, problem.products),
        }

    def _column_terms(
        self, term: Term, row_term: Term | None, shift: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What every tile reads of its columns, made once, bounds, and the power of two: see column_terms_kernel."""
        if term.columns is not None:
            return term.columns, term.bounds, None
        blocks = launch.cdiv(self.m, TERMS_BLOCK)
        terms = self.like.new_empty(2 * len(self.exponents), blocks * TERMS_BLOCK)
        power = None if shift == "online" else self.like.new_empty(1)
        bounds = self.like.new_empty(len(self.exponents)) if self.rows.x.dtype == torch.float16 else None
        other = None if row_term is None or row_term.grad is term.grad else row_term.grad
        replay.start(
            launch.kernels().row_stats_backward.column_terms_kernel, (blocks,),
            term.lse, term.grad, other, self.scale, terms, power, bounds, self.m, self.n, terms.stride(0),
            EXPONENTS=self.exponents, LARGEST=max(self.exponents), SHIFT=shift, SCALE_IS_TENSOR=self.scale_is_tensor,
            BLOCK=TERMS_BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
        return terms, bounds, power

    def times_columns(self, times_scale: bool = True) -> Tensor:
        """[scale] sum_j w_ij cols_j for every row, [splits, rows, D]."""
        if self.config.block_d == 0:
            tiles = launch.cdiv(self.n, self.config.block_m)
            fewest = max(1, launch.processors(self.like.device) // max(1, tiles))
            most = min(MOST_SPLITS, launch.WORKSPACE_BYTES // max(1, self.n * self.d * self.like.element_size()))
            at_once = launch.programs_at_once(self.config, self.like.device, self.d)
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
        limit = launch.WORKSPACE_BYTES if self.d <= launch.WIDE_FEATURES else launch.WIDE_WORKSPACE_BYTES
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
        replay.start(
            launch.kernels().row_stats_backward.row_stats_backward_kernel, (tiles, splits),
            *self.operands, *self.terms, self.ranks, (out, out.stride(-2)), undo, row_begin=rows[0],
            col_begin=columns[0], col_end=columns[1], span=span, TIMES_SCALE=times_scale, **self.sweep_arguments,
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


def _histograms(term: Term | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Axis and counts of a term's histograms, if it has any."""
    return (None, None) if term is None or term.ranks is None else (term.ranks.axis, term.ranks.below)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x, accumulated and returned in at least float32."""
    if weights.dtype in (torch.float16, torch.bfloat16):
        if weights.is_cuda:
            return torch.mm(weights, x, out_dtype=torch.float32)
        return weights.float() @ x.float()
    return weights @ x
