"""The most similar columns of every query against a plain sort, with every rule of who is a candidate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from contrastive_ext.backends.torch import row_stats as torch_blocks
from peak_memory import needs_proc, peak_growth

N, M, E = 23, 41, 6


def _expected(scores, k, skip, allowed):
    found_scores, found_columns = torch.full((len(scores), k), -math.inf).to(scores), torch.full((len(scores), k), -1)
    for i, row in enumerate(scores.tolist()):
        best = sorted((-s, j) for j, s in enumerate(row) if allowed[i, j] and not math.isnan(s))[skip : skip + k]
        for at, (score, j) in enumerate(best):
            found_scores[i, at], found_columns[i, at] = -score, j
    return found_scores, found_columns


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("use_ids, use_positives, margin", [
    (False, False, None), (True, False, None), (False, True, None), (True, True, 1.5), (False, True, 0.0),
])  # fmt: skip
def test_best_columns(run, use_ids, use_positives, margin, skip, monkeypatch):
    backend, device = run
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 8)  # several tiles
    torch.manual_seed(0)
    # small integers: scores are exact on every backend, and many are equal
    q, c = torch.randint(-2, 3, (N, E)).double(), torch.randint(-2, 3, (M, E)).double()
    ids, column_ids, positives = torch.arange(N) % 5, torch.arange(M) % 7, torch.randint(0, M, (N,))
    scores, allowed = q @ c.T, torch.ones(N, M, dtype=torch.bool)
    options = {}
    if use_ids:
        allowed &= ids[:, None] != column_ids
        options |= {"ids": ids.to(device), "column_ids": column_ids.to(device)}
    if use_positives:
        allowed[torch.arange(N), positives] = False
        options["positives"] = positives.to(device)
        if margin is not None:
            allowed &= scores < scores[torch.arange(N), positives, None] - margin
            options["margin"] = margin
    for k in (1, 6, M):
        found = ce.top_columns(q.to(device), c.to(device), k, skip=skip, normalize=False, backend=backend, **options)
        wanted = _expected(scores, k, skip, allowed)
        assert torch.equal(found.columns.cpu(), wanted[1])
        assert torch.equal(found.scores.cpu(), wanted[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosines_of_every_dtype(run, dtype):
    backend, device = run
    q, c = torch.randn(N, E, device=device).to(dtype), torch.randn(M, E, device=device).to(dtype)
    scores = F.normalize(q.double(), dim=1) @ F.normalize(c.double(), dim=1).T
    found = ce.top_columns(q, c, 4, backend=backend)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores.double(), scores.topk(4).values, rtol=0, atol=4e-7)
    torch.testing.assert_close(scores.gather(1, found.columns), found.scores.double(), rtol=0, atol=4e-7)


def test_a_duplicate_of_the_positive_is_no_hard_negative(run):
    """Its score equals the positive's up to rounding, whatever the backend."""
    backend, device = run
    q, c = torch.randn(64, 33, device=device), torch.randn(64, 33, device=device)
    columns = torch.cat([c, c, torch.randn(5, 33, device=device) * 1e-3 - c[:5]])
    positives = torch.arange(64, device=device)
    found = ce.top_columns(q, columns, 1, positives=positives, margin=0.0, backend=backend)
    assert not (found.columns[:, 0] == positives + 64).any()


def test_mined_negatives_train(run):
    """What it is for: [N, k] columns become [B, n, D] negatives."""
    backend, device = run
    q, c = (torch.randn(12, E, device=device).requires_grad_() for _ in range(2))
    index = torch.arange(12, device=device)
    mined = ce.top_columns(q, c, 3, positives=index, backend=backend)
    loss = ce.fused_infonce_loss(q, c, layout="one_way", negatives=c[mined.columns], backend=backend)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, (q, c)))


Q, C = torch.randn(4, 3), torch.randn(5, 3)
INDEX = torch.arange(4)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: ce.top_columns(Q, C, 0), ValueError, "k must be an integer >= 1"),
        (lambda: ce.top_columns(Q, C, 1, skip=-1), ValueError, "skip one >= 0"),
        (lambda: ce.top_columns(Q, C[:, :2], 1), ValueError, r"queries must be \[N, E\] and columns \[M, E\]"),
        (lambda: ce.top_columns(Q, C.double(), 1), ValueError, "of one dtype"),
        (lambda: ce.top_columns(Q.int(), C.int(), 1), TypeError, "float16"),
        (lambda: ce.top_columns(Q, C, 1, ids=INDEX), ValueError, "give both or none"),
        (lambda: ce.top_columns(Q, C, 1, ids=INDEX, column_ids=INDEX), ValueError, r"integers \[5\]"),
        (lambda: ce.top_columns(Q, C, 1, positives=INDEX + 2), ValueError, "name columns, 0 to 4; got 2 to 5"),
        (lambda: ce.top_columns(Q, C, 1, positives=INDEX.int()), ValueError, "int64"),
        (lambda: ce.top_columns(Q, C, 1, margin=0.1), ValueError, "give positives too"),
        (lambda: ce.ranks_of_positives(Q, C, INDEX - 1), ValueError, "got -1 to 2"),
        (lambda: ce.recall_at_k(Q, C, INDEX, (0,)), ValueError, "integers >= 1"),
        (lambda: ce.mean_reciprocal_rank(Q[:0], C, INDEX[:0]), ValueError, "at least one"),
        (lambda: ce.uniformity(Q[:1]), ValueError, "N >= 2"),
        (lambda: ce.uniformity(Q, 0.0), ValueError, "t must be > 0"),
        (lambda: ce.alignment(Q, C), ValueError, "same shape"),
        (lambda: ce.alignment(Q, Q, -1.0), ValueError, "alpha must be > 0"),
    ],
)
def test_bad_arguments_say_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_recall_and_reciprocal_ranks(run, dtype):
    backend, device = run
    q, c = torch.randn(N, E, device=device, dtype=dtype), torch.randn(M, E, device=device, dtype=dtype)
    positives = torch.randint(0, M, (N,), device=device)
    for normalize in (True, False):
        u, v = (F.normalize(x, dim=1) if normalize else x for x in (q, c))
        scores = u @ v.T
        wanted = 1 + (scores > scores.gather(1, positives[:, None])).sum(1)
        options = {"normalize": normalize, "backend": backend}
        assert torch.equal(ce.ranks_of_positives(q, c, positives, **options), wanted)
        recall = ce.recall_at_k(q, c, positives, (1, 5, M), **options)
        assert recall == {k: (wanted <= k).double().mean().item() for k in (1, 5, M)} and recall[M] == 1
        assert ce.mean_reciprocal_rank(q, c, positives, **options) == wanted.double().reciprocal().mean().item()


def test_ties_count_for_the_query(run):
    backend, device = run
    c = torch.randn(7, 9, device=device).repeat(3, 1)
    ranks = ce.ranks_of_positives(c[:7], c, torch.arange(7, device=device) + 7, backend=backend)
    assert (ranks == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignment_and_uniformity(run, dtype):
    backend, device = run
    z1, z2 = (torch.randn(13, 5, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    u1, u2 = (F.normalize(z, dim=1) for z in (z1, z2))
    pairs = torch.combinations(torch.arange(13, device=device))
    for t, alpha in itertools.product((0.5, 2.0), (1.0, 2.0)):
        wanted = (u1[pairs[:, 0]] - u1[pairs[:, 1]]).square().sum(1).mul(-t).exp().mean().log()
        found = ce.uniformity(z1, t, backend=backend)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, z1, retain_graph=True)[0] for x in (found, wanted)))
        wanted, found = (u1 - u2).norm(dim=1).pow(alpha).mean(), ce.alignment(z1, z2, alpha)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(*(torch.autograd.grad(x, (z1, z2), retain_graph=True) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)
    same = ce.alignment(z1, z1, 1.0)
    assert same == 0 and not torch.autograd.grad(same, z1)[0].any()


@needs_proc
@pytest.mark.parametrize("call", [
    "ce.top_columns(q, c, 10, positives=index)", "ce.ranks_of_positives(q, c, index)", "ce.uniformity(q).backward()",
])  # fmt: skip
def test_memory_is_linear(call):
    setup = "q, c, index = torch.randn(n, 64).requires_grad_(), torch.randn(n, 64), torch.arange(n)"
    n = 8192
    growth = peak_growth(setup, call, small=64, large=n)
    assert 0 < growth <= 48 * 2**20, f"{growth / 2**20:.0f} MiB; one matrix is {n * n * 4 / 2**20:.0f} MiB"
