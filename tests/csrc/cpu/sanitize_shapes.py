"""Odd shapes, masks and options through the native ops, for a library built with AddressSanitizer and UBSan.

    python tests/csrc/cpu/sanitize_shapes.py path/to/library.so

Values are checked elsewhere; here only reads, writes and arithmetic that the sanitizers object to can fail.
"""

from __future__ import annotations

import itertools
import sys

import torch

UNFILLED = -(2**63)
SIZES = [(0, 0), (0, 3), (3, 0), (1, 1), (2, 70), (70, 2), (257, 131), (300, 1100)]
torch.ops.load_library(sys.argv[1])
ops = torch.ops.contrastive_ext


def pair_arguments(u, v, images, ids, rule, columns=False):
    """The operators' arguments from num_images to the gate."""
    n, m = u.shape[0], (u if v is None else v).shape[0]
    row_ids = torch.randint(0, 5, (n,)) if ids else None
    col_ids = torch.randint(0, 5, (m,)) if ids and v is not None else None
    for side in (row_ids, col_ids):
        if side is not None:
            side[::3] = UNFILLED
    only_equal_ids = ids and rule == "equal ids"
    ignored, gate = None, (None,) * 4
    if rule == "lists" and not columns:
        ignored = torch.randint(-1, m + 1, (n // 2 if n % 2 == 0 else n, 7))
    if rule == "gate":
        scorers = 1 if columns or v is None or n % 2 else 3
        shape = (scorers, n // 2 if scorers == 3 else n, 5)
        gate = (torch.randn(shape), torch.randn(m, 5), torch.randn(n), torch.randn(m) if scorers == 1 else None)
        gate = tuple(None if x is None else x.to(u.dtype) for x in gate)
    return (images, 0, only_equal_ids, row_ids, col_ids, ignored, *gate)


def run(u, v, images, exponents, scale, unit, ids, columns, means, diagnostics, rule=None, split=False):
    request = (u, v, scale, exponents, *pair_arguments(u, v, images, ids, rule, columns), unit, split)
    lse, _, col_lse, _, _ = ops.row_stats_forward_cpu(*request, columns, means, diagnostics, means)
    grad, grad_columns = torch.randn_like(lse), torch.randn_like(col_lse) if columns else None
    column_args = (col_lse if columns else None, grad_columns)
    ops.row_stats_backward_cpu(*request, lse, grad, *column_args, True, v is not None)
    if v is not None:
        ops.row_stats_backward_cpu(*request, lse, grad, *column_args, False, True)


def best(u, v, k):
    """Columns of v for u as one image each, and as several views of fewer images."""
    n, m = u.shape[0], v.shape[0]
    ids = torch.where(torch.rand(m) < 0.3, UNFILLED, 0)
    ops.top_columns_cpu(u[None], v, k, n, None, None, None, None)
    views = 3 if n % 3 == 0 else 1
    groups = n // views
    rules = torch.arange(groups) % 3, torch.arange(groups) - 1, torch.randn(groups, dtype=u.dtype)
    ops.top_columns_cpu(u.view(views, groups, u.shape[1]), v, k, 0, ids, *rules)


def best_of_one_set(groups, dtype):
    """Views as columns of their own, with enough features that the triangle takes them (top_columns.cpp)."""
    for views, k in ((1, 3), (2, 1), (3, 7)):
        z = torch.randn(views, groups, 11000 * k // (views * groups) + 1, dtype=dtype)
        m = views * groups
        ops.top_columns_cpu(z, None, k, groups, None, None, None, None)
        rules = torch.arange(groups) % 3, torch.arange(groups) - 1, torch.randn(groups, dtype=dtype)
        ops.top_columns_cpu(z, None, k, 0, torch.where(torch.rand(m) < 0.3, UNFILLED, 0), *rules)
        z[0, 0] = torch.nan
        ops.top_columns_cpu(z, None, k, groups, None, None, None, None)


def run_sums(u, v, images, scale, ids, rule):
    request = (u, v, scale, [1.0], *pair_arguments(u, v, images, ids, rule), False, False)
    offset, sign = torch.randn_like(u[:, 0]), 1.0 if ids else -1.0
    total, _, _ = ops.pair_sums_forward_cpu(*request, offset, sign)
    for needs in ((True, True), (True, False), (False, True)):
        ops.pair_sums_backward_cpu(*request, offset, sign, torch.randn_like(total), *needs)


def run_whole(pairs, extra, depth, dtype, layout, formula, parameters, exponents, reduction, normalize):
    z1, z2 = torch.randn(pairs, depth, dtype=dtype), torch.randn(pairs + extra, depth, dtype=dtype)
    z1[0] = 0
    scale = None if normalize else torch.tensor(2.0)
    call = (z1, z2, scale, 3.0, layout, normalize)
    loss, *state, _ = ops.whole_loss_forward_cpu(*call, formula, parameters, exponents, reduction)
    ops.whole_loss_backward_cpu(*call, exponents, reduction, *state, torch.rand_like(loss), not normalize)


def run_ranked(u, v, images, scale, unit, ids, bins, diagnostics, rule=None):
    pairs = pair_arguments(u, v, images, ids, rule)
    request = (u, v, scale, [1.0], *pairs, unit, False, [1.64, 0.36, 1e-10, 0.9, 0.9], bins)
    lse, _, axis, below = ops.ranked_stats_forward_cpu(*request, diagnostics)
    ops.ranked_stats_backward_cpu(*request, lse, axis, below, torch.randn_like(lse), True, v is not None)
    if v is not None:
        ops.ranked_stats_backward_cpu(*request, lse, axis, below, torch.randn_like(lse), False, True)


calls = ranked_calls = 0
rules = itertools.cycle((None, "equal ids", "lists", "gate"))
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    for (n, m), depth, dtype in itertools.product(SIZES, (1, 3, 65), (torch.float32, torch.float64)):
        u, v = torch.randn(n, depth, dtype=dtype), torch.randn(m, depth, dtype=dtype)
        u, v = torch.nn.functional.normalize(u), torch.nn.functional.normalize(v)
        best(u, v, 1 + calls % 11)
        for exponents, scale, ids in itertools.product(([1.0], [1.0, 2.0], [0.5, 1.5]), (2.0, 200.0), (False, True)):
            run(u, v, n if n <= m else 0, exponents, scale, True, ids, True, False, True, next(rules))
            run(u, v, 0, exponents, scale, False, ids, False, True, False, next(rules))
            run(u, None, max(1, n // 2), exponents, scale, True, ids, False, False, calls % 2 == 0, next(rules))
            calls += 3
        for scale, ids, bins in itertools.product((2.0, 200.0), (False, True), (0, 2, 256)):
            run_ranked(u, v, n if n <= m else 0, scale, True, ids, bins, True, next(rules))
            run_ranked(u, None, max(1, n // 2), scale, True, ids, bins, ranked_calls % 4 == 0, next(rules))
            ranked_calls += 2
        for scale, ids in itertools.product((2.0, 200.0), (False, True)):
            run_sums(u, v, n if n <= m else 0, scale, ids, next(rules))
        next(rules)  # another rule meets the next size's options
    for groups, dtype in itertools.product((1, 2, 37, 301), (torch.float32, torch.float64)):
        best_of_one_set(groups, dtype)
    u[0, 0] = float("nan")
    run(u, None, 7, [1.0], 2.0, True, False, False, False, True)
    best(u, v, 3)
    for bins in (0, 256):
        run_ranked(u, None, 7, 2.0, True, False, bins, True)
    ops.use_bf16_products_cpu("model")  # as AMX multiplies, whatever this CPU has
    for (n, m), depth in itertools.product([(1, 1), (2, 70), (70, 2), (97, 61)], (1, 3, 65)):
        u, v = torch.randn(n, depth).bfloat16().float(), torch.randn(m, depth).bfloat16().float()
        images = n if n <= m else 0
        run(u, v, images, [1.0, 2.0], 2.0, False, False, True, True, True, next(rules))
        run(u, None, max(1, n // 2), [1.0], 2.0, False, True, False, True, True, next(rules))
        run_sums(u, v, images, 2.0, False, None)
        for bins in (0, 256):
            run_ranked(u, v, images, 2.0, False, False, bins, True)
            run_ranked(u, None, max(1, n // 2), 2.0, False, False, bins, True)
        u, v = torch.randn(n, depth), torch.randn(m, depth)
        run(u, v, images, [1.0, 2.0], 2.0, False, False, True, True, True, next(rules), split=True)
        run(u, None, max(1, n // 2), [1.0], 2.0, False, True, False, True, True, next(rules), split=True)
    ops.use_bf16_products_cpu("auto")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for pairs, depth, dtype, normalize in itertools.product((1, 2, 37, 300), (1, 15, 65), dtypes, (True, False)):
        for layout, extra in (("two_view", 0), ("one_way", 5), ("symmetric", 0)):
            shared = (pairs, extra, depth, dtype, layout)
            run_whole(*shared, "infonce", [], [1.0], "mean", normalize)
            run_whole(*shared, "hard_negative", [0.1, 1.0, 0.0], [1.0, 2.0], "none", normalize)
print(f"{calls} calls of each row_stats op, {ranked_calls} of each ranked_stats op, nothing found")
