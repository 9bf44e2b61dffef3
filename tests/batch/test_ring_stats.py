"""What one rank of a ring computes, on every backend, without the others: their shards come from a list, and what goes
home to them is looked at. Ranks that really exchange: test_ring.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrastive_ext.batch import ring_stats as module
from contrastive_ext.batch.ring_ranked import RankedColumns, ring_ranked_stats
from contrastive_ext.batch.ring_stats import ring_stats
from contrastive_ext.operators.ranked_stats import ranked_stats
from contrastive_ext.operators.row_stats import row_stats
from contrastive_ext.problem.pairs import Gate
from contrastive_ext.problem.ranking import Ranking

ROWS, SHARDS, FEATURES, SCORES = 8, (8, 5, 7), 6, 3  # own columns, and those of two other ranks
TOTAL = sum(SHARDS)
RANKING = Ranking(tau_plus=0.1, alpha=0.9, beta=0.7, eps=1e-3, bins=8)


class _Played:
    """A ring in which the other shards of the columns, of their ids and of their features are at hand."""

    def __init__(self, *everything: Tensor | None):
        self.shards = [[None] * 3 if x is None else x.split(SHARDS) for x in everything]

    def round(self, *own):
        yield own
        for step in range(1, len(SHARDS)):
            yield tuple(x[step] for x in self.shards)


@pytest.fixture
def home(monkeypatch) -> list[Tensor]:
    """What is sent to the owners of foreign shards, step by step."""
    sent = []

    class Homeward:
        def __init__(self, ring, own):
            self.own = own

        def send(self, gradient, step):
            sent.append(gradient)

        def arrived(self):
            return self.own

    monkeypatch.setattr(module, "Homeward", Homeward)
    return sent


def _problem(device, one_set: bool):
    """Rows, all columns (the rows are the first of them, with one set), scale, ids and a gate of all."""

    def normal(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=1).to(device)

    v = normal(TOTAL, FEATURES)
    u = v[:ROWS].clone() if one_set else normal(ROWS, FEATURES)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device)
    ids = (torch.arange(TOTAL) % 6).to(device)
    scorers, features = normal(ROWS, SCORES), normal(TOTAL, SCORES)
    if one_set:
        features[:ROWS] = scorers
    limit = torch.full((ROWS,), 0.6, dtype=torch.float64, device=device)
    return u, v, scale, ids, scorers, features, limit


@pytest.mark.parametrize("one_set", [True, False], ids=["one set", "two sets"])
def test_a_rank_of_a_ring_is_a_call_with_all_columns(run, one_set, home):
    backend, device = run
    u, v, scale, ids, scorers, features, limit = _problem(device, one_set)
    options = {
        "exponents": (1.0, 2.0), "num_images": ROWS // 2, "row_ids": ids[:ROWS], "unit": True, "backend": backend,
        "diagnostics": True,
    }  # fmt: skip

    leaves = [x.clone().requires_grad_() for x in (u, v, scale)]
    gate = Gate(scorers[None], features, limit)
    whole = row_stats(leaves[0], leaves[1], scale=leaves[2], col_ids=ids, gate=gate, **options)
    weight = torch.randn(2, ROWS, dtype=torch.float64).to(device)
    du, dv, dscale = torch.autograd.grad((whole.lse * weight).sum(), leaves)
    if one_set:
        du = du + dv[:ROWS]

    mine = [x.clone().requires_grad_() for x in (u, v[:ROWS], scale)]
    own = Gate(scorers[None], features[:ROWS], limit, limit if one_set else None)
    ours = ring_stats(
        _Played(v, ids, features), mine[0], None if one_set else mine[1], scale=mine[2], ids=ids[:ROWS], gate=own,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(ours.lse, whole.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.aux, whole.aux, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((ours.lse * weight).sum(), mine, allow_unused=True)
    expected = (du, None if one_set else dv[:ROWS], dscale)
    for x, y in zip((*found, *home), (*expected, *dv.split(SHARDS)[1:]), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_ranks_are_among_the_columns_of_all_sets_and_ranks(run, home):
    backend, device = run
    u, v, scale, ids, *_ = _problem(device, False)
    queue, queue_ids = torch.randn(9, FEATURES, dtype=torch.float64).to(device) / 3, (torch.arange(9) % 4).to(device)
    rules = {"num_images": ROWS, "positive_offset": 0, "ignored": None, "gate": None, "unit": True}
    options = {"ranking": RANKING, "diagnostics": True, "row_ids": ids[:ROWS], "backend": backend}

    leaves = [x.clone().requires_grad_() for x in (u, v, scale)]
    everything = {"num_images": ROWS, "col_ids": torch.cat([ids, queue_ids]), "scale": leaves[2], **options}
    whole = ranked_stats(leaves[0], torch.cat([leaves[1], queue]), **everything)
    weight = torch.randn(ROWS, dtype=torch.float64).to(device)
    du, dv, dscale = torch.autograd.grad((whole.lse * weight).sum(), leaves)

    mine = [x.clone().requires_grad_() for x in (u, v[:ROWS], scale)]
    sets = [
        RankedColumns(_Played(v, ids, None), mine[1], ids[:ROWS], rules),
        RankedColumns(None, queue, queue_ids, rules | {"num_images": 0, "unit": False}),
    ]
    lse, aux = ring_ranked_stats(mine[0], sets, scale=mine[2], **options)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aux, whole.aux, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((lse * weight).sum(), mine)
    for x, y in zip((*found, *home), (du, dv[:ROWS], dscale, *dv.split(SHARDS)[1:]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
