"""Matrix flops as each method executes them: what its share of the library's GEMM rate is counted with."""

from __future__ import annotations

import math

import torch

from .case import Case
from .losses import dense_of, is_ranked
from .own_losses import OwnLoss

# Flops of (forward, backward) per element of the N x M matrix and feature, as executed; a multiply-add is 2.
#   dense      keeps the matrix
#   recompute  forms it a second time in the backward
#   triangle   visits the upper triangle of one set only; s and two products per tile in the backward
#   rows       every row block visits all columns; one set needs s and one product, two sets swap roles and run again
#   tiles      as rows, but the forward of one set visits the upper triangle
#   stored     as tiles, but both sides, or both triangles of one set, share the weights
#   histogram  whole rows in the forward, the triangle in the backward
#   sweeps     three forward sweeps for range, counts and sums of a histogram, `rows` in the backward
# The fused paths make a queue's gradient in the forward. Self-labels: the labels of a block and of its partners;
# views: scores and logits, the fused detection is a sweep of its own.
FLOPS = {
    "dense": {
        "two_view": (2, 4), "symmetric": (2, 4), "queue": (2, 2), "self_labels": (8, 4), "soft_targets": (4, 2),
        "views": (4, 4), "labelled": (2, 4), "classes": (2, 4), "binary": (2, 4),
    },
    "recompute": {
        "two_view": (2, 6), "symmetric": (4, 12), "queue": (2, 4), "self_labels": (8, 12), "soft_targets": (4, 6),
        "views": (4, 8), "labelled": (2, 6), "classes": (2, 6), "binary": (2, 6),
    },
    "triangle": {
        "two_view": (1, 3), "symmetric": (2, 6), "queue": (4, 0), "self_labels": (12, 0), "soft_targets": (8, 0),
        "views": (3, 3), "labelled": (1, 3), "classes": (3, 9), "binary": (2, 6),
    },
    "rows": {
        "two_view": (2, 4), "symmetric": (2, 8), "queue": (4, 0), "self_labels": (12, 0), "soft_targets": (8, 0),
        "views": (4, 4), "labelled": (2, 4), "classes": (4, 10), "binary": (2, 6),
    },
    "histogram": {"two_view": (2, 3), "symmetric": (4, 12), "queue": (2, 4)},
    "sweeps": {"two_view": (6, 4), "symmetric": (12, 8), "queue": (6, 2)},
}  # fmt: skip
FLOPS["tiles"] = FLOPS["rows"] | {"two_view": (1, 4), "views": (3, 4), "labelled": (1, 4)}
FLOPS["stored"] = FLOPS["tiles"] | {"symmetric": (2, 6), "two_view": (1, 3), "views": (3, 3), "labelled": (1, 3)}
ALGORITHMS = {"chunked": "recompute", "torch": "triangle", "cpu": "triangle", "triton": "tiles", "cuda": "rows"}
STORED_FROM = 257  # features from which `triton` stores weights for both sides
# A loss of ranks sees whole rows; what is not listed recomputes.
RANKED_ALGORITHMS = {
    "cpu, histogram": "histogram",
    "triton, histogram": "sweeps",
    "eager": "dense",
    "comparison": "dense",
}


def executed_flops(method: str, case: Case, processors: int | None = None) -> tuple[float, float]:
    """Matrix flops of forward and backward as `method` executes them; methods without a row are dense.

    processors  of the GPU, on which a batch too small to occupy it is no triangle; None: large enough
    """
    algorithm, ranked, dense = ALGORITHMS.get(method, "dense"), is_ranked(case), dense_of(case)
    if algorithm == "tiles" and case.dim >= STORED_FROM:
        algorithm = "stored"
    if ranked:
        algorithm = RANKED_ALGORITHMS.get(method, "recompute")
    forward, backward = FLOPS[algorithm][case.layout]
    if processors is not None and method == "triton" and not ranked and forward % 2:
        forward, backward = _as_laid_out(case, processors, forward, backward)
    columns = case.m + (case.n if isinstance(dense, OwnLoss) and dense.batch_keys else 0)
    elements = float(case.n) * columns * case.dim
    if method in ("triton", "cpu"):
        elements *= {"fp16x3": 3, "bf16x3": 6}.get(case.dtype, 1)
    return forward * elements, backward * elements


def _as_laid_out(case: Case, processors: int, forward: float, backward: float) -> tuple[float, float]:
    """One set as contrastive_ext.backends.triton.forward lays it out: squares where triangles do not pay."""
    from contrastive_ext.backends.triton import forward as triton_forward
    from contrastive_ext.backends.triton import launch as triton_launch

    products = {"float32": "ieee", "tf32": "tf32", "float64": "fp64", "fp16x3": "split"}.get(case.dtype, "16-bit")
    config = triton_launch.kernels().configs.choose(
        "forward", products, case.dim, triton_launch.architecture(torch.device("cuda"))
    )
    if -(-case.n // config.block_m) < triton_forward.TRIANGLE_FROM * processors:
        forward += 1
    if case.dim >= STORED_FROM:  # blocks on the diagonal are multiplied whole
        is_wide = case.dim > triton_launch.WIDE_FEATURES
        limit = triton_launch.WIDE_WORKSPACE_BYTES if is_wide else triton_launch.WORKSPACE_BYTES
        side = math.isqrt(limit // case.torch_dtype.itemsize)
        backward += 1 / -(-case.n // side)
    return forward, backward
