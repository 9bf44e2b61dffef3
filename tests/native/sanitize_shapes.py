"""Odd shapes, masks and options through the native ops, for a library built with AddressSanitizer and UBSan.

    python tests/native/sanitize_shapes.py path/to/library.so

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


def run(u, v, images, exponents, scale, unit, ids, columns, means, diagnostics):
    n, m = u.shape[0], (u if v is None else v).shape[0]
    row_ids = torch.randint(0, 5, (n,)) if ids else None
    col_ids = torch.randint(0, 5, (m,)) if ids and v is not None else None
    for side in (row_ids, col_ids):
        if side is not None:
            side[::3] = UNFILLED
    request = (u, v, scale, exponents, images, 0, row_ids, col_ids, unit)
    lse, _, col_lse, _, _ = ops.row_stats_forward_cpu(*request, columns, means, diagnostics)
    grad, grad_columns = torch.randn_like(lse), torch.randn_like(col_lse) if columns else None
    column_args = (col_lse if columns else None, grad_columns)
    ops.row_stats_backward_cpu(*request, lse, grad, *column_args, True, v is not None)
    if v is not None:
        ops.row_stats_backward_cpu(*request, lse, grad, *column_args, False, True)


def run_ranked(u, v, images, scale, unit, ids, bins, diagnostics):
    n, m = u.shape[0], (u if v is None else v).shape[0]
    row_ids = torch.randint(0, 5, (n,)) if ids else None
    col_ids = torch.randint(0, 5, (m,)) if ids and v is not None else None
    for side in (row_ids, col_ids):
        if side is not None:
            side[::3] = UNFILLED
    request = (u, v, scale, [1.0], images, 0, row_ids, col_ids, unit, [-0.64, 1.64, 0.9, 0.9], bins)
    lse, _, axis, below = ops.ranked_stats_forward_cpu(*request, diagnostics)
    ops.ranked_stats_backward_cpu(*request, lse, axis, below, torch.randn_like(lse), True, v is not None)
    if v is not None:
        ops.ranked_stats_backward_cpu(*request, lse, axis, below, torch.randn_like(lse), False, True)


calls = 0
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    for (n, m), depth, dtype in itertools.product(SIZES, (1, 3, 65), (torch.float32, torch.float64)):
        u, v = torch.randn(n, depth, dtype=dtype), torch.randn(m, depth, dtype=dtype)
        u, v = torch.nn.functional.normalize(u), torch.nn.functional.normalize(v)
        for exponents, scale, ids in itertools.product(([1.0], [1.0, 2.0], [0.5, 1.5]), (2.0, 200.0), (False, True)):
            run(u, v, n if n <= m else 0, exponents, scale, True, ids, True, False, True)
            run(u, v, 0, exponents, scale, False, ids, False, True, False)
            run(u, None, max(1, n // 2), exponents, scale, True, ids, False, False, calls % 2 == 0)
            calls += 3
        for scale, ids, bins in itertools.product((2.0, 200.0), (False, True), (0, 2, 256)):
            run_ranked(u, v, n if n <= m else 0, scale, True, ids, bins, True)
            run_ranked(u, None, max(1, n // 2), scale, True, ids, bins, calls % 2 == 0)
            calls += 2
    u[0, 0] = float("nan")
    run(u, None, 7, [1.0], 2.0, True, False, False, False, True)
    for bins in (0, 256):
        run_ranked(u, None, 7, 2.0, True, False, bins, True)
print(f"{calls} calls, nothing found")
