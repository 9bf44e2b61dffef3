"""Odd shapes, masks and options through both native ops, for a library built with AddressSanitizer and UBSan.

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


def run_whole(pairs, extra, depth, dtype, layout, formula, parameters, exponents, reduction, normalize):
    z1, z2 = torch.randn(pairs, depth, dtype=dtype), torch.randn(pairs + extra, depth, dtype=dtype)
    z1[0] = 0
    scale = None if normalize else torch.tensor(2.0)
    call = (z1, z2, scale, 3.0, layout, normalize)
    loss, *state, _ = ops.whole_loss_forward_cpu(*call, formula, parameters, exponents, reduction)
    ops.whole_loss_backward_cpu(*call, exponents, reduction, *state, torch.rand_like(loss), not normalize)


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
    u[0, 0] = float("nan")
    run(u, None, 7, [1.0], 2.0, True, False, False, False, True)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for pairs, depth, dtype, normalize in itertools.product((1, 2, 37, 300), (1, 15, 65), dtypes, (True, False)):
        for layout, extra in (("two_view", 0), ("one_way", 5), ("symmetric", 0)):
            shared = (pairs, extra, depth, dtype, layout)
            run_whole(*shared, "infonce", [], [1.0], "mean", normalize)
            run_whole(*shared, "hard_negative", [0.1, 1.0, 0.0], [1.0, 2.0], "none", normalize)
print(f"{calls} calls of each op, nothing found")
