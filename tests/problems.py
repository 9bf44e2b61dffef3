"""Problems of the streaming operator, one row per combination of pair rules, and its definition, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ext import row_stats
from contrastive_ext.problem.pairs import NO_COLUMN, NO_COLUMN_ID, NO_ROW_ID, UNFILLED, Gate

# name, rows, columns (None: one set), what else is passed, why it is there
PROBLEMS = [
    ("one_set", 20, None, {"num_images": 10}, "two views"),
    ("three_views", 21, None, {"num_images": 7}, "more than one positive is left out"),
    ("one_set_no_images", 9, None, {}, "even an anchor's own column is a candidate"),
    ("clip", 12, 12, {"num_images": 12, "columns": True}, "rows and columns from one pass"),
    ("one_way", 5, 13, {"num_images": 5}, "more columns than rows"),
    ("rank_shard", 6, 24, {"num_images": 3, "positive_offset": 12}, "local anchors, gathered columns"),
    ("rank_shard_columns", 6, 24, {"num_images": 6, "positive_offset": 12, "columns": True}, "offset, both sides"),
    ("queue", 7, 30, {}, "no positive among the columns"),
    ("two_exponents", 16, None, {"num_images": 8, "exponents": (1.0, 2.0)}, "hard negatives, squaring is possible"),
    ("odd_exponents", 16, None, {"num_images": 8, "exponents": (0.3, 1.3)}, "hard negatives, squaring is not"),
    ("two_exponents_columns", 8, 8, {"num_images": 8, "exponents": (0.5, 1.5), "columns": True}, "both at once"),
    ("ids", 20, None, {"num_images": 10, "ids": "rows"}, "equal ids are ignored"),
    ("ids_two_sets", 12, 15, {"num_images": 12, "ids": "both"}, "ids on two sides"),
    ("ids_columns", 9, 9, {"num_images": 9, "ids": "both", "columns": True}, "ids seen from both sides"),
    ("padded", 14, None, {"num_images": 7, "ids": "padded rows"}, "asymmetric: padding is no candidate, but an anchor"),
    ("padded_columns", 9, 11, {"num_images": 9, "ids": "padded both", "columns": True}, "asymmetric from both sides"),
    ("unfilled", 6, 10, {"ids": "columns"}, "a queue that is not full, anchors without ids"),
    ("all_ignored", 8, None, {"num_images": 4, "ids": "equal"}, "every row is empty"),
    ("some_ignored", 8, 6, {"ids": "one class"}, "some rows are empty"),
    ("equal_ids", 12, None, {"num_images": 12, "ids": "rows", "only_equal_ids": True}, "supervised positives"),
    ("equal_ids_columns", 9, 8, {"ids": "both", "only_equal_ids": True, "columns": True}, "the same from both sides"),
    ("lists", 20, None, {"num_images": 10, "lists": (10, 3)}, "detected false negatives, from both sides"),
    ("lists_of_rows", 70, None, {"num_images": 35, "lists": (70, 4), "ids": "padded rows"}, "lists and ids at once"),
    ("lists_two_sets", 12, 40, {"num_images": 6, "lists": (6, 5)}, "false negatives among other columns"),
    ("lists_without_end", 6, 9, {"lists": (2, 12), "exponents": (1.0, 2.0)}, "longer than there are columns"),
    ("gate", 20, None, {"num_images": 10, "gate": 1}, "a guide for one set"),
    ("gate_columns", 11, 11, {"num_images": 11, "gate": 1, "columns": True}, "a guide for rows and columns"),
    ("gate_scorers", 12, 30, {"num_images": 6, "gate": 3, "ids": "columns"}, "several scorers, shared by two rows"),
]  # fmt: skip
IDS = [p[0] for p in PROBLEMS]


def _ids(kind: str | None, n: int, m: int | None, device) -> dict[str, Tensor]:
    if kind is None:
        return {}
    rows, cols = torch.arange(n) % 4, torch.arange(m or n) % 4
    if kind == "equal":
        rows = torch.zeros(n, dtype=torch.int64)
    elif kind == "one class":
        cols = torch.zeros_like(cols)
    elif kind.startswith("padded"):
        rows[1::3], cols[::4] = UNFILLED, UNFILLED
    elif kind == "columns":
        cols = torch.where(cols < 2, UNFILLED, NO_COLUMN_ID)
    named = {"row_ids": rows, "col_ids": cols}
    keep = {"rows": ["row_ids"], "padded rows": ["row_ids"], "equal": ["row_ids"], "columns": ["col_ids"]}
    return {name: named[name].to(device) for name in keep.get(kind, named)}


def _lists(shape: tuple[int, int], m: int) -> Tensor:
    """Distinct columns in any order, then NO_COLUMN."""
    groups, length = shape
    lists = torch.full(shape, NO_COLUMN)
    for g in range(groups):
        some = torch.randperm(m)[: torch.randint(0, length + 1, ()).item()]
        lists[g, : len(some)] = some
    return lists


def _gate(num_scorers: int, n: int, m: int, one_set: bool, columns: bool, dtype, device) -> Gate:
    groups = n if num_scorers == 1 else n // 2
    scorers = torch.randn(num_scorers, groups, 3, dtype=torch.float64)
    features = scorers[0] if one_set else torch.randn(m, 3, dtype=torch.float64)
    row_limit = torch.randn(n, dtype=torch.float64)
    col_limit = row_limit if one_set else torch.randn(m, dtype=torch.float64) if columns else None
    gate = (None if x is None else x.to(device, dtype) for x in (scorers, features, row_limit, col_limit))
    return Gate(*gate)


def negatives(n: int, m: int, options: dict, one_set: bool) -> tuple[Tensor, Tensor]:
    """keep(i -> j) and keep(j -> i), pair by pair as pairs.py states the rules."""
    images, offset = options.get("num_images", 0), options.get("positive_offset", 0)
    row_ids = options.get("row_ids", torch.full((n,), NO_ROW_ID)).tolist()
    col_ids = row_ids if one_set and "row_ids" in options else [NO_COLUMN_ID] * m
    col_ids = options["col_ids"].tolist() if "col_ids" in options else col_ids
    forward, backward = torch.zeros(n, m, dtype=torch.bool), torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            same_image = bool(images) and 0 <= j - offset < n and i % images == (j - offset) % images
            counts = not same_image and (row_ids[i] == col_ids[j]) == options.get("only_equal_ids", False)
            forward[i, j] = counts and col_ids[j] != UNFILLED
            backward[i, j] = counts and row_ids[i] != UNFILLED
    if "ignored" in options:
        lists = options["ignored"].tolist()
        for i in range(n):
            forward[i, [j for j in lists[i % len(lists)] if j >= 0]] = False
        for j in range(m if one_set else 0):
            backward[[i for i in lists[j % len(lists)] if i >= 0], j] = False
    if "gate" in options:
        gate = options["gate"]
        score = torch.stack([s.repeat(n // len(s), 1) @ gate.features.T for s in gate.scorers]).amax(0).cpu()
        forward &= score <= gate.row_limit.cpu()[:, None]
        if gate.col_limit is not None:
            backward &= score <= gate.col_limit.cpu()
    return forward, backward


def lse_of(s: Tensor, keep: Tensor, beta: float) -> Tensor:
    """log sum_j e^{beta s_j} over a row's negatives; -inf where there are none."""
    empty = ~keep.any(1)
    masked = (beta * s).masked_fill(~keep, -torch.inf).masked_fill(empty[:, None], 0.0)
    return masked.logsumexp(1).masked_fill(empty, -torch.inf)


def make_problem(problem, device, dtype=torch.float64, unit=True):
    """Rows, columns or None, scale and options of row_stats for a row of the table; unit rows if `unit`."""
    _, n, m, options, _ = problem
    options = dict(options)
    u = torch.randn(n, 6, dtype=torch.float64)
    v = None if m is None else torch.randn(m, 6, dtype=torch.float64)
    if unit:
        u, v = torch.nn.functional.normalize(u), None if v is None else torch.nn.functional.normalize(v)
    options |= _ids(options.pop("ids", None), n, m, device)
    if "lists" in options:
        options["ignored"] = _lists(options.pop("lists"), m or n).to(device)
    if "gate" in options:
        options["gate"] = _gate(options["gate"], n, m or n, m is None, "columns" in options, dtype, device)
    scale = torch.tensor(3.0, dtype=dtype, device=device)
    return u.to(device, dtype), None if v is None else v.to(device, dtype), scale, options


def check_definition(run, problem, unit):
    """Statistics and gradients of a problem are those of the definition in float64, on run's backend and device."""
    backend, device = run
    u, v, scale, options = make_problem(problem, device, unit=unit)
    leaves = [x.requires_grad_() for x in (u, v, scale) if x is not None]
    swept = row_stats(u, v, scale=scale, unit=unit, diagnostics=True, backend=backend, **options)

    columns = u if v is None else v
    exponents = options.get("exponents", (1.0,))
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
    forward, backward = (k.to(device) for k in negatives(len(u), len(columns), on_cpu, one_set=v is None))
    s = scale * (u @ columns.T)
    sides = [(swept.lse, swept.aux, s, forward)]
    if options.get("columns"):
        sides.append((swept.col_lse, swept.col_aux, s.T, backward.T))
    ours, truth = 0.0, 0.0
    for lse, aux, logits, keep in sides:
        expected = torch.stack([lse_of(logits, keep, beta) for beta in exponents])
        torch.testing.assert_close(lse, expected, rtol=1e-13, atol=1e-13)
        kept = logits.where(keep, 0.0).detach()
        largest = logits.detach().masked_fill(~keep, -torch.inf).amax(1)
        expected_aux = [keep.sum(1).double(), largest, kept.sum(1), lse_of(logits.detach(), keep, 2 * exponents[0])]
        torch.testing.assert_close(aux, torch.stack(expected_aux), rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(expected)
        finite = expected.isfinite()
        ours = ours + (lse.where(finite, 0.0) * weights).sum()
        truth = truth + (expected.where(finite, 0.0) * weights).sum()
    if truth.requires_grad:
        for got, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
