"""The `triton` backend: the kernels of contrastive_ext.triton_kernels on NVIDIA GPUs from sm_80 on.

Forward: one kernel over tiles, one that merges its partial results. Backward: one kernel per side. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors in Triton's interpreter, which is how they are tested without a
GPU. Nothing here waits for the device: a scale tensor is read by the kernels, sizes of workspaces follow from shapes.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pairs import NO_COLUMN
from ..problem import Problem, Statistics, Upstream
from . import torch_blocks, triton_pairs
from .triton_pairs import Side

NAME = "triton"

OLDEST_NVIDIA = (8, 0)  # bf16 and TF32 products, asynchronous copies
WORKSPACE_BYTES = 64 << 20  # of column partials in the forward, and of weights up to 512 features
WIDE_WORKSPACE_BYTES = 256 << 20  # of weights beyond: fewer, larger library products
INTERPRETED_PROCESSORS = 3  # a GPU small enough that test problems are split
MERGE_BLOCK = 128


def why_not(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype, dim: int) -> str | None:
    """None, or why the Triton kernels cannot take this call."""
    missing = _why_missing()
    if missing is not None:
        return missing
    if device.type == "cpu":
        return None if _interpreted() else "it computes on GPUs and the tensors are on cpu (TRITON_INTERPRET is not 1)."
    if device.type != "cuda":
        return f"it computes on CUDA devices and the tensors are on {device}."
    if torch.version.hip is not None:
        return "there are no tile sizes for ROCm devices yet (triton_kernels/configs.py)."
    if torch.cuda.get_device_capability(device) < OLDEST_NVIDIA:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 or newer; {device} has {major}.{minor}."
    return None


def forward(problem: Problem, *, columns: bool, means: bool, diagnostics: bool, maximum: bool) -> Statistics:
    """Row statistics of `problem`; see `Statistics`."""
    return _Forward(problem, columns, means, diagnostics, maximum).run()


def backward(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """dL/du and dL/dv (an empty tensor where not needed); du holds both directions when there is one set."""
    row_term = _Term(upstream.lse.contiguous(), upstream.grad_lse.contiguous())
    col_term = row_term if problem.one_set else None
    if upstream.col_lse is not None and upstream.grad_col_lse is not None:
        col_term = _Term(upstream.col_lse.contiguous(), upstream.grad_col_lse.contiguous())
    u, v = _operands(problem)
    du, dv = problem.u.new_empty(0), problem.u.new_empty(0)  # an operator's results must not share memory
    rows, cols = triton_pairs.sides(problem, u, v)
    with _on(problem.u.device):
        if upstream.need_u:
            du = _total(_weighted_columns(problem, rows, cols, row_term, col_term))
        if upstream.need_v and not problem.one_set:
            dv = _total(_weighted_columns(problem, cols, rows, col_term, row_term))
    return du, dv


class _Term(NamedTuple):
    """One direction of the weights: exp(beta_k s - lse_k) times the coefficient of lse_k, and omega where ranked."""

    lse: Tensor
    grad: Tensor
    ranks: _Ranks | None = None


class _Ranks(NamedTuple):
    """Histograms of the anchors and the four numbers that turn a rank into a weight."""

    bins: int
    axis: Tensor
    below: Tensor
    shape: Tensor


class _Forward:
    """The launches of one forward call; `out` are lse and count of the sides, [sides, K, N] and [sides, 1, N]."""

    def __init__(
        self,
        problem: Problem,
        columns: bool,
        means: bool,
        diagnostics: bool,
        maximum: bool,
        out: tuple[Tensor, Tensor] | None = None,
    ):
        self.out = out
        self.problem, self.pairs, self.columns, self.means = problem, problem.pairs, columns, means
        self.u, self.v = _operands(problem)
        self.rows, self.cols = triton_pairs.sides(problem, self.u, self.v)
        self.n, self.m, self.d = len(self.u), len(self.v), self.u.shape[1]
        self.fused_means = means and len(problem.exponents) == 1 and self.d <= _kernels().configs.RESIDENT_FEATURES
        # the mean costs a second product and an accumulator like those of the backward
        mask = triton_pairs.costliest_rule(self.pairs)
        counted = mask != "images"
        mask = "ids" if diagnostics and not counted else mask  # as many counters
        self.config = _config("backward" if self.fused_means else "forward", self.u, mask)
        exponents = problem.exponents + ((2 * problem.exponents[0],) if diagnostics else ())
        # a fused mean rounds exponentials to the operand dtype: at most 1, by the running maximum
        online = self.fused_means or maximum
        shift = "online" if online else _shift(problem, exponents, _kernels().online_lse.MAX_PLAIN.value)
        has_shift = shift != "plain"
        self.num_parts = has_shift + len(exponents) + counted + 2 * diagnostics
        self.flags: dict[str, Any] = {"EXPONENTS": exponents, "NUM_PARTS": self.num_parts, "DIAGNOSTICS": diagnostics}
        self.merge_flags = self.flags | {"HAS_SHIFT": has_shift, "COUNTED": counted, "MAXIMUM": maximum}
        self.flags |= {"SHIFT": shift, "LARGEST": max(exponents), "COLUMNS": columns, "MEANS": self.fused_means}
        self.rules = triton_pairs.arguments(
            self.pairs,
            self.rows,
            self.cols,
            row_anchors=True,
            col_anchors=columns,
            guide_chunk=_guide_chunk(self.u.device),
        )

    def run(self) -> Statistics:
        tiles = _cdiv(self.n, self.config.block_m)
        splits, span = _split(tiles, self.m, self.config.block_n, 2 * _processors(self.u.device))
        row_partials = self._empty(splits, self.num_parts, self.n)
        mean_partials = self._empty(splits, self.n, self.d) if self.fused_means else None
        col_lse, col_aux, mean = self._empty(0), self._empty(0), self._empty(0)
        with _on(self.u.device):
            if self.columns:
                bytes_of_tile = self.num_parts * self.m * self.problem.stats_dtype.itemsize
                at_once = max(1, min(tiles, WORKSPACE_BYTES // max(1, bytes_of_tile)))
                col_partials = self._empty(at_once + 1, self.num_parts, self.m)
                for first in range(0, max(1, tiles), at_once):
                    count = min(at_once, tiles - first)
                    # slot 0 carries what earlier launches found
                    self._sweep(first, (count, splits), span, row_partials, col_partials[1:], mean_partials)
                    begin, last = (1 if first == 0 else 0), first + count == tiles
                    col_lse, col_aux = self._merge(
                        1, col_partials, begin, count + 1, self._candidates_of_columns(), last
                    )
            else:
                self._sweep(0, (tiles, splits), span, row_partials, None, mean_partials)
            lse, aux = self._merge(0, row_partials, 0, splits, self._candidates_of_rows(), finish=True)
            if mean_partials is not None:
                mean = self._merge_means(row_partials, mean_partials)
            elif self.means:
                mean = self._means_by_weights(lse)
        return Statistics(lse, aux, col_lse, col_aux, mean)

    def _empty(self, *shape: int) -> Tensor:
        return self.problem.u.new_empty(shape, dtype=self.problem.stats_dtype)

    def _sweep(self, first_tile, grid, span, row_partials, col_partials, mean_partials) -> None:
        scale, scale_is_tensor = _scale(self.problem)
        _kernels().row_stats_forward.row_stats_forward_kernel[grid](
            self.u, self.v, scale, row_partials, col_partials, mean_partials, self.n, self.m, first_tile, span,
            self.u.stride(0), self.v.stride(0), SCALE_IS_TENSOR=scale_is_tensor, **self.rules, **self.flags,
            **_common(self.config, self.u),
        )  # fmt: skip

    def _candidates_of_rows(self) -> tuple[int, int, int, int]:
        """(candidates, those of the same image, first anchor and number of anchors that have the latter)"""
        pairs = self.pairs
        return self.m, pairs.num_rows // pairs.num_images if pairs.num_images else 0, 0, self.n

    def _candidates_of_columns(self) -> tuple[int, int, int, int]:
        pairs = self.pairs
        same_image = pairs.num_rows // pairs.num_images if pairs.num_images else 0
        return self.n, same_image, pairs.positive_offset, pairs.num_rows

    def _merge(
        self, side: int, partials: Tensor, begin: int, end: int, candidates, finish: bool
    ) -> tuple[Tensor, Tensor]:
        anchors = partials.shape[-1]
        if self.out is None:
            lse = self._empty(len(self.problem.exponents), anchors)
            aux = self._empty(4 if self.flags["DIAGNOSTICS"] else 2 if self.merge_flags["MAXIMUM"] else 1, anchors)
        else:
            lse, aux = self.out[0][side], self.out[1][side]
        _kernels().merge.merge_kernel[(_cdiv(anchors, MERGE_BLOCK),)](
            partials, lse, aux, begin, end, anchors, *candidates, FINISH=finish, BLOCK=MERGE_BLOCK,
            enable_fp_fusion=True, **self.merge_flags,
        )  # fmt: skip
        return lse, aux

    def _merge_means(self, row_partials: Tensor, mean_partials: Tensor) -> Tensor:
        mean = self._empty(1, self.n, self.d)
        block, block_d = 32, min(64, _feature_block(self.d))
        _kernels().merge.merge_means_kernel[(_cdiv(self.n, block), _cdiv(self.d, block_d))](
            row_partials, mean_partials, mean, len(row_partials), self.n, D=self.d, BLOCK=block, BLOCK_D=block_d,
            EXPONENTS=self.flags["EXPONENTS"], NUM_PARTS=self.num_parts, enable_fp_fusion=True,
        )  # fmt: skip
        return mean

    def _means_by_weights(self, lse: Tensor) -> Tensor:
        """Two exponents, or more features than a program holds: the backward's sweep with coefficients 1/beta_k."""
        means = []
        for beta, one_lse in zip(self.problem.exponents, lse.split(1), strict=True):
            term = _Term(one_lse.contiguous(), torch.full_like(one_lse, 1 / beta))
            splits = _weighted_columns(self.problem, self.rows, self.cols, term, None, (beta,), times_scale=False)
            means.append(_total(splits))
        return torch.stack(means)


def _total(splits: Tensor) -> Tensor:
    """[splits, rows, D] -> [rows, D]."""
    return splits[0] if len(splits) == 1 else splits.sum(0)


def top_columns(
    scorers: Tensor, features: Tensor, k: int, num_images: int, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and columns [G, k] of the k best columns of every image; see top_columns.py.

    Lists longer than triton_kernels.top_columns.MAX_LISTED do not fit a program: the `torch` backend makes them.
    """
    if k > _kernels().top_columns.MAX_LISTED:
        return torch_blocks.top_columns(scorers, features, k, num_images, col_ids)
    num_scorers, groups, _ = scorers.shape
    config = _config("top_columns", features, "images")
    tiles = _cdiv(groups, config.block_m)
    splits, span = _split(tiles, len(features), config.block_n, 2 * _processors(scorers.device))
    length = max(2, 1 << (k - 1).bit_length())
    scores = scorers.new_empty(splits, groups, length)
    columns = torch.empty_like(scores, dtype=torch.int32)
    with _on(scorers.device):
        _kernels().top_columns.top_columns_kernel[tiles, splits](
            scorers, features, col_ids, scores, columns, groups, len(features), num_images, num_scorers, span, K=length,
            **_common(config, features),
        )  # fmt: skip
    # every split's list, side by side: columns ascending, then scores descending, which keeps the order of equals
    columns, order = columns.transpose(0, 1).flatten(1).long().sort(1)
    scores, order = scores.transpose(0, 1).flatten(1).gather(1, order).sort(dim=1, descending=True, stable=True)
    scores, columns = scores[:, :k].contiguous(), columns.gather(1, order)[:, :k]
    return scores, columns.masked_fill(scores == -torch.inf, NO_COLUMN)


def _weighted_columns(
    problem: Problem,
    rows: Side,
    cols: Side,
    row_term: _Term | None,
    col_term: _Term | None,
    exponents: tuple[float, ...] | None = None,
    times_scale: bool = True,
) -> Tensor:
    """[scale] sum_j w_ij cols_j for every row, [splits, rows, D]; see triton_kernels/row_stats_backward.py."""
    exponents = exponents or problem.exponents
    term = row_term or col_term
    ranks = term.ranks if term else None
    config = _config("backward", rows.x, triton_pairs.costliest_rule(problem.pairs), ranked=ranks is not None)
    (n, d), m, like = rows.x.shape, len(cols.x), problem.u.new_empty(0, dtype=problem.stats_dtype)
    both = row_term is not None and col_term is not None
    scale, scale_is_tensor = _scale(problem)
    shift = _shift(problem, exponents, _kernels().row_stats_backward.MAX_FACTORED.value) if both else "online"
    if ranks:
        shift = "online"  # each direction has its own omega: nothing to factor
    terms = (*(row_term or (None, None))[:2], *(col_term or (None, None))[:2])
    tables = (*_table_of(row_term), *_table_of(col_term), ranks and ranks.shape)
    anchors = {"row_anchors": row_term is not None, "col_anchors": col_term is not None}
    rules = triton_pairs.arguments(problem.pairs, rows, cols, **anchors, guide_chunk=_guide_chunk(rows.x.device))

    def sweep(row_begin: int, grid: tuple[int, int], span: int, out: Tensor, undo: Tensor) -> None:
        _kernels().row_stats_backward.row_stats_backward_kernel[grid](
            rows.x, cols.x, scale, *terms, *tables, out, undo, n, m, row_begin, span, rows.x.stride(0),
            cols.x.stride(0), out.stride(-2), SHIFT=shift, LARGEST=max(exponents), EXPONENTS=exponents,
            SCALE_IS_TENSOR=scale_is_tensor, FORWARD=row_term is not None, REVERSE=col_term is not None,
            TIMES_SCALE=times_scale, BINS=ranks.bins if ranks else 0, **rules, **_common(config, rows.x),
        )  # fmt: skip

    if config.block_d == 0:
        tiles = _cdiv(n, config.block_m)
        splits, span = _split(tiles, m, config.block_n, _processors(like.device))
        out = like.new_empty(splits, n, d)
        sweep(0, (tiles, splits), span, out, like.new_empty(0))
        return out
    out = like.new_empty(n, d)
    width = _cdiv(m, 64) * 64  # rows of weights stay aligned
    budget = (WORKSPACE_BYTES if d <= 512 else WIDE_WORKSPACE_BYTES) // (width * rows.x.element_size())
    height = min(_cdiv(n, config.block_m), max(1, budget // config.block_m)) * config.block_m
    weights, undo = rows.x.new_empty(height, width), like.new_empty(height, 1)
    for begin in range(0, n, height):
        count = min(height, n - begin)
        tiles = _cdiv(count, config.block_m)
        splits, span = _split(tiles, m, config.block_n, 4 * _processors(like.device))
        sweep(begin, (tiles, splits), span, weights, undo)
        torch.mul(_product(weights[:count, :m], cols.x), undo[:count], out=out[begin : begin + count])
    return out[None]


def _table_of(term: _Term | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Axis and counts of a term's histograms, if it has any."""
    return (None, None) if term is None or term.ranks is None else (term.ranks.axis, term.ranks.below)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x, accumulated and returned in at least float32."""
    if weights.dtype in (torch.float16, torch.bfloat16):
        if weights.is_cuda:
            return torch.mm(weights, x, out_dtype=torch.float32)
        return weights.float() @ x.float()
    return weights @ x


def _operands(problem: Problem) -> tuple[Tensor, Tensor]:
    """u and v in the dtype whose values they hold."""
    dtype = problem.operand_dtype
    if dtype == torch.bfloat16 and _interpreted():
        dtype = torch.float32  # the interpreter's bf16 products are wrong; float32 holds the same values
    u = problem.u.to(dtype)
    return u, u if problem.v is None else problem.v.to(dtype)


def _scale(problem: Problem) -> tuple[float | Tensor, bool]:
    """The kernel's scale argument; a number would arrive as float32."""
    if isinstance(problem.scale, Tensor):
        return problem.scale, True
    if problem.u.dtype == torch.float64:
        return problem.u.new_full((), problem.scale), True
    return problem.scale, False


def _shift(problem: Problem, exponents: tuple[float, ...], limit: float) -> str:
    """Whether exponentials need a running maximum, decided here or, for a scale tensor, by the kernel itself."""
    if not problem.unit:
        return "online"
    if isinstance(problem.scale, Tensor):
        return "device"
    return "plain" if problem.scale * _kernels().scores.LOG2E.value * max(exponents) <= limit else "online"


def _common(config, operand: Tensor) -> dict[str, Any]:
    features = operand.shape[1]
    return {
        "D": features,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d or _feature_block(features),
        "PRECISION": "tf32" if _kind(operand) == "tf32" else "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # the default until Triton 3.9 announced to change it
    }


def _kind(operand: Tensor) -> str:
    """Which products: 16-bit, tf32, ieee or fp64."""
    if operand.dtype != torch.float32:
        return "fp64" if operand.dtype == torch.float64 else "16-bit"
    everything: Any = torch.backends
    allowed = everything.cuda.matmul.fp32_precision  # the older getter, allow_tf32, raises once this one was set
    if allowed == "none":  # not set for products: the setting for everything counts
        allowed = everything.fp32_precision
    return "tf32" if allowed == "tf32" and operand.is_cuda else "ieee"


def _config(direction: str, operand: Tensor, mask: str, ranked: bool = False):
    architecture = _architecture(operand.device)
    return _kernels().configs.choose(direction, _kind(operand), operand.shape[1], architecture, mask, ranked)


def _guide_chunk(device: torch.device) -> int:
    configs = _kernels().configs
    return configs.GUIDE_FEATURES[configs.nearest(_architecture(device))]


def _feature_block(features: int) -> int:
    return max(16, 1 << (features - 1).bit_length())  # products take powers of two from 16 on


def _split(tiles: int, columns: int, block: int, programs: int) -> tuple[int, int]:
    """How many splits of the columns bring tiles x splits close to `programs`, and the columns of a split."""
    column_tiles = _cdiv(columns, block)
    splits = max(1, min(programs // max(1, tiles), column_tiles))
    span = _cdiv(column_tiles, splits) * block
    return max(1, _cdiv(columns, max(1, span))), span


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _architecture(device: torch.device) -> int:
    """90 for sm_90; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _why_missing() -> str | None:
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    return None


@cache
def _kernels():
    """The kernels, imported on first use: Triton is optional."""
    from .. import triton_kernels
    from ..triton_kernels import (  # noqa: F401
        configs,
        histogram_ranks,
        merge,
        online_lse,
        pairs,
        prologue,
        row_losses,
        row_stats_backward,
        row_stats_forward,
        scores,
        top_columns,
    )

    return triton_kernels


@cache
def _interpreted() -> bool:
    import triton

    return not isinstance(_kernels().merge.merge_kernel, triton.JITFunction)
