"""False negatives cancelled by ids or by a guide: against masks written down by hand; what cannot be meant raises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext as ce
from rows import random_pairs

B, D, T = 13, 6, 0.4


def _masked_infonce(a: Tensor, candidates: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Mean over anchors of -log softmax of the positive among itself and the candidates that are not ignored."""
    a, candidates, positive = (F.normalize(x, dim=1) for x in (a, candidates, positive))
    pos = (a * positive).sum(1) / T
    logits = (a @ candidates.T / T).masked_fill(ignored, -torch.inf)
    return (torch.cat([pos[:, None], logits], 1).logsumexp(1) - pos).mean()


def _assert_same(run, ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    got, wanted = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.fixture
def pairs(run):
    return [z.requires_grad_() for z in random_pairs(B, D, torch.float64, run[1])]


def test_equal_ids_are_no_negatives(run, pairs):
    z1, z2 = pairs
    ids = torch.randint(0, 4, (B,), device=z1.device, dtype=torch.int32)
    ours = ce.fused_infonce_loss(z1, z2, T, ids=ids, backend=run[0])
    twice = torch.cat([ids, ids])
    expected = _masked_infonce(torch.cat(pairs), torch.cat(pairs), torch.cat([z2, z1]), twice[:, None] == twice)
    _assert_same(run, ours, expected, pairs)
    labelled = ce.fused_infonce_loss(z1, z2, T, labels=ids, backend=run[0])
    assert torch.equal(labelled, ours)


@pytest.mark.parametrize("held", ["tensor", "module"])
def test_queue_ids_are_compared_with_the_batch(run, pairs, held):
    z1, z2 = pairs
    keys = F.normalize(torch.randn(9, D, dtype=torch.float64, device=z1.device))
    ids, queue_ids = torch.arange(B, device=z1.device) % 5, torch.arange(9, device=z1.device) % 7
    options = {"queue": ce.Columns(keys, ids=queue_ids)}
    if held == "module":
        queue = ce.NegativeQueue(9, D, dtype=torch.float64, device=z1.device)
        queue.enqueue(keys, queue_ids)
        options = {"queue": queue}
    ours = ce.fused_infonce_loss(z1, z2, T, ids=ids, layout="one_way", backend=run[0], **options)
    same = torch.cat([ids[:, None] == ids, ids[:, None] == queue_ids], 1)
    expected = _masked_infonce(z1, torch.cat([z2, keys]), z2, same)
    _assert_same(run, ours, expected, pairs)


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_guide_margins_of_gistembed(run, pairs, margin, strategy):
    """The masks of sentence-transformers' GISTEmbedLoss, contrasting anchors with the other side only."""
    z1, z2 = pairs
    g1, g2 = (torch.randn(B, 4, dtype=torch.float64, device=z1.device) for _ in range(2))
    g2 = g1 + 0.5 * g2
    similarity = F.normalize(g1) @ F.normalize(g2).T
    guided = similarity.diagonal()[:, None]
    limit = guided - margin if strategy == "absolute" else guided - guided.abs() * margin
    own = torch.eye(B, dtype=torch.bool, device=z1.device)
    expected = _masked_infonce(z1, z2, z2, (similarity > limit) | own)
    options = {"guide": ce.Guide(g1, g2, margin, relative=strategy == "relative")}
    ours = ce.fused_infonce_loss(z1, z2, T, layout="one_way", backend=run[0], **options)
    _assert_same(run, ours, expected, pairs)
    reverse = _masked_infonce(z2, z1, z1, (limit < similarity.T) | own)
    both = ce.fused_infonce_loss(z1, z2, T, layout="symmetric", backend=run[0], **options)
    _assert_same(run, both, (expected + reverse) / 2, pairs)


def test_a_guide_for_two_views_and_a_queue(run, pairs):
    z1, z2 = pairs
    g1, g2, gq = (torch.randn(n, 3, dtype=torch.float64, device=z1.device) for n in (B, B, 8))
    keys = F.normalize(torch.randn(8, D, dtype=torch.float64, device=z1.device))
    ours = ce.fused_infonce_loss(z1, z2, T, queue=ce.Columns(keys, guide=gq), guide=(g1, g2), backend=run[0])
    g1, g2, gq = (F.normalize(g) for g in (g1, g2, gq))
    anchors = torch.cat([g1, g2])
    limit = (g1 * g2).sum(1).repeat(2)[:, None]
    image = torch.arange(2 * B, device=z1.device) % B
    own = torch.cat([image[:, None] == image, torch.zeros(2 * B, 8, dtype=torch.bool, device=z1.device)], 1)
    ignored = own | (anchors @ torch.cat([anchors, gq]).T > limit)
    expected = _masked_infonce(torch.cat(pairs), torch.cat([z1, z2, keys]), torch.cat([z2, z1]), ignored)
    _assert_same(run, ours, expected, pairs)


def test_everything_cancelled_costs_nothing(run, pairs):
    loss, stats = ce.fused_debiased_loss(
        *pairs, ids=torch.ones(B, device=pairs[0].device).long(), backend=run[0], return_stats=True
    )
    loss.backward()
    assert loss.item() == 0.0
    assert all(z.grad.eq(0).all() for z in pairs)
    assert stats.to_dict()["empty_rows"] == 2 * B
    assert stats.to_dict()["cancelled_fraction"] == 1.0


def test_stats_report_what_was_cancelled(run, pairs):
    ids = torch.arange(B, device=pairs[0].device) % 2
    _, stats = ce.fused_infonce_loss(*pairs, ids=ids, backend=run[0], return_stats=True)
    even, odd = (B + 1) // 2, B // 2
    cancelled = (even * 2 * (even - 1) + odd * 2 * (odd - 1)) / (B * 2 * (B - 1))
    assert stats.to_dict()["cancelled_fraction"] == pytest.approx(cancelled)


IDS, GUIDE, KEYS = torch.zeros(3, dtype=torch.int64), (torch.ones(3, 2), torch.ones(3, 2)), torch.ones(5, 4)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"ids": IDS, "labels": IDS}, "not both"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"integers \[3\]"),
        ({"ids": torch.zeros(3)}, "float32"),
        ({"queue": ce.Columns(KEYS, ids=torch.zeros(5).long())}, "give ids or labels too"),
        ({"queue": ce.Columns(KEYS, ids=IDS), "ids": IDS}, r"ids of queue must be integers \[5\]"),
        ({"guide": (torch.ones(2, 2), torch.ones(3, 2))}, r"guide\[0\] must be"),
        ({"guide": (torch.ones(3, 2), torch.ones(3, 3))}, r"guide\[1\] must be"),
        ({"queue": ce.Columns(KEYS, guide=torch.ones(5, 2))}, "need guide"),
        ({"guide": GUIDE, "queue": KEYS}, "go together"),
        ({"guide": GUIDE, "queue": ce.Columns(KEYS, guide=torch.ones(5, 3))}, r"guide of queue must be .* \[5, 2\]"),
    ],
)
def test_what_cannot_be_meant_raises(arguments, says):
    with pytest.raises(ValueError, match=says):
        ce.fused_infonce_loss(torch.ones(3, 4), torch.ones(3, 4), **arguments)


def test_ids_of_more_columns_than_rows(run):
    """The rows' ids are the beginning of the columns', in the same memory: each side is looked up by value."""
    eye = torch.eye(6, dtype=torch.float64, device=run[1])
    a, b = eye[:2], eye[:4]
    ids = torch.tensor([5, 6, 0, 1], device=run[1])
    ours = ce.fused_infonce_loss(a, b, 1.0, layout="one_way", ids=ids, reduction="none", backend=run[0])
    expected = torch.full((2,), math.log1p(3 / math.e), dtype=torch.float64, device=run[1])
    torch.testing.assert_close(ours, expected)


def test_ids_in_any_memory(run, pairs):
    """A column of a table of ids, and a queue's in another: kernels must not read their neighbours."""
    z1, z2 = pairs
    table = torch.randint(0, 4, (B, 2), device=z1.device)
    keys = F.normalize(torch.randn(9, D, dtype=torch.float64, device=z1.device))
    queue_table = torch.randint(0, 4, (9, 3), device=z1.device)
    results = []
    for ids, queue_ids in ((table[:, 0], queue_table[:, 1]), (table[:, 0].clone(), queue_table[:, 1].clone())):
        options = {"ids": ids, "queue": ce.Columns(keys, ids=queue_ids), "reduction": "none", "backend": run[0]}
        results.append(ce.fused_infonce_loss(z1, z2, T, **options))
    assert torch.equal(*results)
