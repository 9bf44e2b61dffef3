"""The most similar columns of every image against a plain sort; ties, gaps, bad numbers."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_ext.backends.torch import row_stats as torch_blocks
from contrastive_ext.operators.top_columns import TopColumns, merge, top_columns
from contrastive_ext.problem.pairs import NO_COLUMN, NO_COLUMN_ID, UNFILLED

# scorers per image, images, columns, features, k, num_images
PROBLEMS = [
    (1, 5, 10, 4, 3, 5),
    (2, 7, 14, 6, 10, 7),
    (3, 4, 33, 5, 1, 0),
    (8, 6, 12, 3, 20, 6),  # longer lists than candidates
    (2, 70, 210, 16, 4, 70),
]


def _expected(scorers, features, k, num_images, col_ids) -> TopColumns:
    groups = scorers.shape[1]
    scores, columns = torch.full((groups, k), -math.inf), torch.full((groups, k), NO_COLUMN)
    for g in range(groups):
        found = []
        for j in range(len(features)):
            if (num_images and j % num_images == g) or (col_ids is not None and col_ids[j] == UNFILLED):
                continue
            score = max((scorers[:, g] @ features[j]).tolist())
            if not math.isnan(score):
                found.append((-score, j))
        for at, (score, j) in enumerate(sorted(found)[:k]):
            scores[g, at], columns[g, at] = -score, j
    return TopColumns(scores, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_best_columns(run, problem, dtype, monkeypatch):
    backend, device = run
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 8)  # several tiles
    s, g, m, e, k, images = problem
    # small integers: scores are exact on every backend, and many are equal
    scorers, features = torch.randint(-2, 3, (s, g, e)).to(dtype), torch.randint(-2, 3, (m, e)).to(dtype)
    ids = torch.where(torch.arange(m) % 4 == 1, UNFILLED, NO_COLUMN_ID)
    for col_ids in (None, ids):
        expected = _expected(scorers, features, k, images, col_ids)
        moved = None if col_ids is None else col_ids.to(device)
        found = top_columns(
            scorers.to(device), features.to(device), k, num_images=images, col_ids=moved, backend=backend
        )
        assert torch.equal(found.columns.cpu(), expected.columns)
        assert torch.equal(found.scores.cpu().float(), expected.scores)


# scorers per image, images, features, k: enough features that `cpu` takes the triangle, in the last case too few
ONE_SETS = [(1, 5, 4500, 2), (2, 7, 7200, 10), (3, 40, 340, 4), (2, 6, 3, 20)]


@pytest.mark.parametrize("problem", ONE_SETS, ids=str)
def test_columns_that_are_the_scorers_themselves(run, problem, monkeypatch):
    backend, device = run
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 8)
    s, g, e, k = problem
    scorers = torch.randint(-2, 3, (s, g, e)).float()
    scorers[..., 50:] = 0  # small sums: many are equal
    ids = torch.where(torch.arange(s * g) % 4 == 1, UNFILLED, NO_COLUMN_ID)
    for images, col_ids in ((g, None), (0, None), (g, ids)):
        expected = _expected(scorers, scorers.flatten(0, 1), k, images, col_ids)
        moved = None if col_ids is None else col_ids.to(device)
        found = top_columns(scorers.to(device), None, k, num_images=images, col_ids=moved, backend=backend)
        assert torch.equal(found.columns.cpu(), expected.columns)
        assert torch.equal(found.scores.cpu(), expected.scores)


def test_many_columns_and_random_scores(run):
    backend, device = run
    size = 200 if backend == "triton" and device.type == "cpu" else 1500
    scorers, features = torch.randn(2, size // 2, 9, device=device), torch.randn(size, 9, device=device)
    found = top_columns(scorers, features, 7, num_images=size // 2, backend=backend)
    scores = (scorers @ features.T).amax(0)
    own = torch.arange(size, device=device) % (size // 2) == torch.arange(size // 2, device=device)[:, None]
    expected = scores.masked_fill(own, -torch.inf).topk(7)
    torch.testing.assert_close(found.scores, expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.gather(1, found.columns), expected.values, rtol=1e-5, atol=1e-5)


def test_bad_numbers_are_never_among_the_best(run):
    backend, device = run
    scorers, features = torch.randn(1, 4, 3, device=device), torch.randn(9, 3, device=device)
    features[2], scorers[0, 3] = torch.nan, torch.nan
    found = top_columns(scorers, features, 9, backend=backend)
    assert not found.columns.eq(2).any()
    assert found.columns[3].eq(NO_COLUMN).all()
    assert found.scores[3].eq(-torch.inf).all()


def test_sets_of_columns_merge():
    # small integers: scores do not depend on the shape of the product, and many are equal, across the sets too
    scorers, features = torch.randint(-3, 4, (2, 6, 5)).float(), torch.randint(-3, 4, (20, 5)).float()
    whole = top_columns(scorers, features, 6, backend="torch")
    parts = [top_columns(scorers, f, 6, backend="torch") for f in (features[:12], features[12:])]
    merged = merge(*parts, columns_before=12)
    assert torch.equal(merged.columns, whole.columns)
    assert torch.equal(merged.scores, whole.scores)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"scorers": torch.ones(4, 3)}, ValueError, r"\[S, G, E\]"),
        ({"features": torch.ones(5, 2)}, ValueError, r"\[5, 2\]"),
        ({"features": torch.ones(5, 3).double()}, TypeError, "float64"),
        ({"k": 0}, ValueError, "k >= 1"),
        ({"num_images": 3}, ValueError, "num_images 0 or 4"),
        ({"col_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"int64 \[5\]"),
        ({"features": None, "col_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"int64 \[4\]"),
        ({"features": None, "scorers": torch.ones(4, 3)}, ValueError, r"\[S, G, E\]"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    with pytest.raises(error, match=says):
        top_columns(**({"scorers": torch.ones(1, 4, 3), "features": torch.ones(5, 3), "k": 2} | arguments))
