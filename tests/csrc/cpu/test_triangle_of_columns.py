"""The best columns of one set on `cpu`: the triangle gives, bit for bit, the lists of the square, which take the same
vectors as two sets, on any number of threads."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from contrastive_ext.backends import native
from contrastive_ext.operators.top_columns import top_columns
from contrastive_ext.problem.pairs import NO_COLUMN_ID, UNFILLED

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
PLACES_WORTH = 10_000  # csrc/cpu/top_columns.cpp: the triangle wants m E of this for a place of a list
THREADS = (1, 2, 3)


def _random(*shape):
    x = torch.randn(shape)
    return x.round() if sys.platform == "darwin" else x  # the library's products may differ in the last bit there


def _crowded(*shape):
    x = torch.zeros(shape)  # few features count: most scores are equal to many others
    x[..., :3] = torch.randint(-1, 2, (*shape[:-1], 3)).float()
    return x


def _duplicates(*shape):
    x = _random(*shape)
    x[:, 1::2] = x[:, : shape[1] // 2 * 2 : 2].clone()
    return x


def _collapsed(*shape):
    return torch.ones(shape)


def _one_view_collapsed(*shape):
    x = torch.randint(-1, 2, shape).float()
    x[-1] = 1.0
    return x


def _better_and_better(*shape):
    return torch.ones(shape) * torch.arange(shape[1])[:, None]


def _signed_zeros(*shape):
    x = torch.zeros(shape)
    x[:, ::3, 0], x[:, 1::3, 0] = 1.0, -0.0
    return x


def _not_numbers(*shape):
    x = _random(*shape)
    x[0, 0], x[-1, -1], x[0, shape[1] // 2, 0] = math.nan, math.inf, -math.inf
    return x


def _overflowing(*shape):
    """Scores beyond float32, and inf - inf in some of them."""
    x = torch.randint(-1, 2, shape).float()
    x[-1, ::3] *= 2.0**100
    return x


KINDS = (
    _random, _crowded, _duplicates, _collapsed, _one_view_collapsed, _better_and_better, _signed_zeros, _not_numbers,
    _overflowing,
)  # fmt: skip
# views, images, k: one image, blocks and tiles with ragged ends, several of each, lists longer than the candidates
SIZES = [
    (1, 1, 1),
    (2, 1, 3),
    (3, 2, 10),
    (2, 33, 1),
    (1, 33, 60),
    (2, 257, 8),
    (3, 257, 3),
    (1, 700, 10),
    (2, 700, 10),
]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _vectors(kind, views, images, k, dtype):
    features = max(8, math.ceil(PLACES_WORTH * k / (views * images)))
    return kind(views, images, features).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[1:])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lists_are_those_of_the_square(size, kind, dtype):
    views, images, k = size
    z = _vectors(kind, *size, dtype)
    m = views * images
    ids = torch.where(torch.arange(m) % 4 == 1, UNFILLED, NO_COLUMN_ID)
    every_rule = {
        "col_ids": torch.arange(m) % 5, "row_ids": torch.arange(images) % 7, "excluded": torch.arange(images) - 1,
        "below": torch.full((images,), 2.0, dtype=dtype),
    }  # fmt: skip
    for options in ({"num_images": images}, {}, {"num_images": images, "col_ids": ids}, every_rule):
        square = top_columns(z, z.flatten(0, 1), k, **options, backend="cpu")
        for threads in THREADS:
            torch.set_num_threads(threads)
            triangle = top_columns(z, None, k, **options, backend="cpu")
            assert torch.equal(triangle.columns, square.columns)
            assert torch.equal(triangle.scores, square.scores)


@pytest.mark.parametrize(
    "kind", [_crowded, _one_view_collapsed, _better_and_better], ids=lambda kind: kind.__name__[1:]
)
@pytest.mark.parametrize("size", [(1, 33, 60), (2, 257, 8), (3, 700, 4)], ids=str)
def test_lists_are_those_of_a_sort_where_scores_are_exact(size, kind):
    views, images, k = size
    z = _vectors(kind, *size, torch.float64)
    scores = (z @ z.flatten(0, 1).T).amax(0)
    own = torch.arange(views * images) % images == torch.arange(images)[:, None]
    best = scores.masked_fill(own, -torch.inf).sort(dim=1, descending=True, stable=True)
    length = min(k, views * (images - 1))
    found = top_columns(z, None, k, num_images=images, backend="cpu")
    assert torch.equal(found.columns[:, :length], best.indices[:, :length])
    assert torch.equal(found.scores[:, :length], best.values[:, :length])
