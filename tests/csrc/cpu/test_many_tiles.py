"""The `cpu` backend on problems of several row blocks and column tiles, which those of problems.py are too small
for, and on any number of threads: rules that change from tile to tile, both sides of the diagonal, blocks that wrap."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from accuracy import Result, assert_as_accurate_as_dense
from contrastive_ext import row_stats
from contrastive_ext.backends import native
from contrastive_ext.operators.top_columns import top_columns
from contrastive_ext.problem.pairs import Gate
from problems import check_definition, make_problem

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
CPU = "cpu", torch.device("cpu")
ACCELERATE = sys.platform == "darwin"

# name, rows, columns (None: one set), what else is passed, why it is there: as in problems.py
PROBLEMS = [
    ("ids", 530, None, {"num_images": 265, "ids": "padded rows"}, "every strip holds equal ids"),
    ("equal_ids_columns", 210, 530, {"ids": "padded both", "only_equal_ids": True, "columns": True}, "both sides"),
    ("lists", 530, None, {"num_images": 265, "lists": (265, 2)}, "most strips are plain; two columns to a list"),
    ("lists_of_few", 531, None, {"lists": (3, 40), "ids": "padded rows"}, "lists turned around repeat in a tile"),
    ("lists_two_sets", 210, 530, {"num_images": 105, "lists": (105, 9)}, "one direction"),
    ("gate", 530, None, {"num_images": 265, "gate": 1, "lists": (530, 4)}, "a guide's tile on the diagonal"),
    ("gate_columns", 210, 530, {"gate": 1, "ids": "both", "columns": True}, "limits of rows and columns"),
    ("gate_scorers", 210, 530, {"num_images": 105, "gate": 3}, "row blocks wrap around the scorers"),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p[0])
def test_pair_rules_across_tiles(problem):
    check_definition(CPU, problem, unit=PROBLEMS.index(problem) % 2 == 0)  # static shift and online maximum in turn


@pytest.fixture
def on_threads():
    """Calls a function on 1, 2 and 3 threads; the results."""
    before = torch.get_num_threads()

    def results(function):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield function()

    yield results
    torch.set_num_threads(before)


def _sixteenths(x):
    """Rounded towards zero, so that dot products are exact: no bit of them is the choice of the matrix library."""
    return (16 * x).trunc() / 16


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p[0])
def test_results_repeat_and_do_not_depend_on_threads(on_threads, problem):
    """The same bits again on any number of threads. On macOS products are the library's, which may multiply in another
    order: there statistics of exact products have to be the same, whose order of summation is ours alone."""
    u, v, scale, options = make_problem(problem, CPU[1], dtype=torch.float32)
    if ACCELERATE:
        u, v = _sixteenths(u), None if v is None else _sixteenths(v)
    if ACCELERATE and "gate" in options:
        gate = options["gate"]
        options["gate"] = replace(gate, scorers=_sixteenths(gate.scorers), features=_sixteenths(gate.features))

    def once(dtype=torch.float32, backend="cpu"):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (u, v) if x is not None]
        limits = {} if "gate" not in options else {"gate": _as(options["gate"], dtype)}
        swept = row_stats(
            leaves[0], *leaves[1:], scale=scale.to(dtype), unit=True, diagnostics=True, backend=backend,
            **options | limits,
        )  # fmt: skip
        total = swept.lse.where(swept.lse.isfinite(), 0.0).sum()
        return list(swept), torch.autograd.grad(total, leaves)

    _, truth = once(torch.float64, "torch")
    _, dense = once(backend="torch")  # one tile: the whole matrix
    expected = None
    for (statistics, gradients), again in on_threads(lambda: (once(), once())):
        for a, b in zip([*statistics, *gradients], [*again[0], *again[1]], strict=True):
            assert torch.equal(a, b)
        same = statistics if ACCELERATE else [*statistics, *gradients]
        expected = expected or same
        assert all(map(torch.equal, same, expected))
        ours, whole, exact = ({str(i): x for i, x in enumerate(grads)} for grads in (gradients, dense, truth))
        nothing = torch.zeros(1)
        results = (Result(nothing, grads) for grads in (ours, whole, exact))
        assert_as_accurate_as_dense(*results, logit=scale.item(), terms={}, dtype=torch.float32)


def _as(gate, dtype):
    limits = (None if x is None else x.to(dtype) for x in (gate.scorers, gate.features, gate.row_limit, gate.col_limit))
    return Gate(*limits)


@pytest.mark.parametrize("integers", [True, False], ids=["ties", "random"])
def test_top_columns_do_not_depend_on_threads_or_tiles(on_threads, integers):
    images, views, k = 350, 2, 12
    scorers, features = torch.randn(3, images, 33), torch.randn(views * images, 33)
    # with integers many scores are equal: the lower column comes first
    scorers, features = (x.round() if integers else _sixteenths(x) for x in (scorers, features))
    first, *others = on_threads(lambda: top_columns(scorers, features, k, num_images=images, backend="cpu"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    scores = (scorers @ features.T).amax(0).view(images, views, images)
    scores = scores.masked_fill(torch.eye(images, dtype=torch.bool)[:, None], -torch.inf).flatten(1)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(first.scores, expected.values[:, :k])
    assert torch.equal(first.columns, expected.indices[:, :k])
