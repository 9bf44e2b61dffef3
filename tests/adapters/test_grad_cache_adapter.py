"""GradCache's loss: its definition, inside its three steps, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_ext.adapters.grad_cache import SimpleContrastiveLoss
from parity import assert_compiles, assert_same, assert_survives_copies
from peak_memory import needs_proc, peak_growth


def _inputs(queries: int, documents: int):
    return torch.randn(queries, 5, dtype=torch.float64), torch.randn(documents, 5, dtype=torch.float64)


def _host(x, y, target=None, reduction="mean"):
    """GradCache 0.1.0: positives at every (M // B)-th row."""
    if target is None:
        target = torch.arange(0, len(x) * (len(y) // len(x)), len(y) // len(x))
    return F.cross_entropy(x @ y.T, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("queries, documents", [(6, 6), (6, 18), (4, 11), (1, 3), (1, 1)])
def test_same_as_its_definition(queries, documents, reduction):
    loss, options = SimpleContrastiveLoss(), {"reduction": reduction}
    assert_same(lambda x, y: loss(x, y, **options), lambda x, y: _host(x, y, **options), *_inputs(queries, documents))
    options["target"] = torch.randperm(documents)[:queries].int()
    wanted = options | {"target": options["target"].long()}
    assert_same(lambda x, y: loss(x, y, **options), lambda x, y: _host(x, y, **wanted), *_inputs(queries, documents))


def test_number_of_hard_negatives_is_the_stride():
    target = torch.arange(0, 12, 3)
    assert_same(SimpleContrastiveLoss(2), lambda x, y: _host(x, y, target), *_inputs(4, 14))
    assert_same(SimpleContrastiveLoss(0), lambda x, y: _host(x, y, torch.arange(4)), *_inputs(4, 14))


def test_cached_gradients_are_those_of_the_whole_batch():
    """GradCache's steps: representations without a graph, the gradient of the loss by them, a surrogate per chunk."""
    encoder, inputs = torch.nn.Linear(7, 5).double(), torch.randn(12, 7, dtype=torch.float64)
    loss = SimpleContrastiveLoss()
    wanted = torch.autograd.grad(_host(encoder(inputs[:6]), encoder(inputs[6:])), encoder.parameters())
    with torch.no_grad():
        x, y = encoder(inputs[:6]), encoder(inputs[6:])
    cache = torch.autograd.grad(loss(x.requires_grad_(), y.requires_grad_()), (x, y))
    for chunk, gradient in zip(inputs.split(3), torch.cat(cache).split(3), strict=True):
        (encoder(chunk) * gradient).sum().backward()
    torch.testing.assert_close(tuple(p.grad for p in encoder.parameters()), wanted, rtol=1e-12, atol=1e-13)


def test_it_is_a_value():
    loss = SimpleContrastiveLoss(2)
    assert_survives_copies(loss, *_inputs(4, 12))
    assert_compiles(loss, *_inputs(4, 12))
    assert repr(loss) == "SimpleContrastiveLoss(n_hard_negatives=2)"


@needs_proc
def test_memory_is_linear():
    setup = """
from contrastive_ext.adapters.grad_cache import SimpleContrastiveLoss
x, y = (torch.randn(rows, 128).requires_grad_() for rows in (n // 2, n))
"""
    growth = peak_growth(setup, "SimpleContrastiveLoss()(x, y).backward()", small=16, large=12288)
    assert growth <= 100 * 2**20, f"{growth / 2**20:.0f} MiB; the matrix alone is 288 MiB"


@pytest.mark.parametrize(
    "sizes, options, says",
    [
        ((4, 3), {}, r"M >= B >= 1; got .*\[4, 5\].*\[3, 5\]"),
        ((4, 8), {"target": torch.tensor([0, 1, 1, 2])}, "two queries: each needs a document of its own"),
        ((4, 8), {"target": torch.tensor([0, 1, 2, 8])}, r"rows of y, 0 to 7; got 0 to 8"),
        ((4, 8), {"target": torch.tensor([0, 1, 2])}, r"target must be integers \[4\]"),
        ((4, 8), {"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_refusals(sizes, options, says):
    with pytest.raises(ValueError, match=says):
        SimpleContrastiveLoss()(*_inputs(*sizes), **options)


def test_refused_numbers_of_hard_negatives():
    with pytest.raises(ValueError, match="n_hard_negatives must be >= 0; got -1"):
        SimpleContrastiveLoss(-1)
    with pytest.raises(ValueError, match="4 queries with n_hard_negatives=2 need 12 documents; got 8"):
        SimpleContrastiveLoss(2)(*_inputs(4, 8))
    with pytest.raises(TypeError, match="x must be a tensor"):
        SimpleContrastiveLoss()(None, None)
