"""The Bayesian loss: ranks and ties, weights, histograms against exact ranks, and what every other loss promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import contrastive_ext as ce
import golden_files
from contrastive_ext.operators.ranked_stats import ranked_stats
from contrastive_ext.problem.ranking import AUTO_EXACT_CANDIDATES, Ranking, histogram_axis
from promises import (
    check_accuracy,
    check_autocast_changes_nothing,
    check_gradients,
    check_one_graph,
    check_statistics,
)
from rows import INPUTS, RANKED, RANKED_USAGES, SHAPES, crowded_pairs, peaked_pairs, random_pairs

EXACT, HISTOGRAM = RANKED
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
RANKING = Ranking(tau_plus=0.1, alpha=0.9, beta=0.9, eps=1e-3, bins=0)
NO_IDS = torch.iinfo(torch.int64).min
ids_of = {"ids": lambda x: x.name}


def _ranked(backend, u, v=None, *, bins=0, upstream=None, scale=1.0, **options):
    """lse, statistics and gradients of one call."""
    u = u.detach().clone().requires_grad_()
    leaves = [u] if v is None else [u, v := v.detach().clone().requires_grad_()]
    ranking = Ranking(RANKING.tau_plus, RANKING.alpha, RANKING.beta, RANKING.eps, bins)
    swept = ranked_stats(u, v, ranking=ranking, scale=scale, diagnostics=True, backend=backend, **options)
    upstream = torch.linspace(0.5, 1.5, len(u), dtype=u.dtype, device=u.device) if upstream is None else upstream
    kept = swept.lse.where(swept.aux[0] > 0, 0.0)
    return [swept.lse.detach(), *swept.aux, *torch.autograd.grad((kept * upstream).sum(), leaves)]


def _assert_same(ours, expected, **close):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE))


# --- ranks


def _dense(u, v, keep, scale, weight_of):
    """lse, statistics and gradients by the definition, with weights from weight_of(logits of a row's negatives)."""
    u = u.detach().clone().requires_grad_()
    leaves = [u] if v is None else [u, v := v.detach().clone().requires_grad_()]
    s = scale * (u @ (u if v is None else v).T)
    rows = []
    for x, kept in zip(s, keep, strict=True):
        x = x[kept]
        w = weight_of(x.detach())
        terms = x + w.log()
        rows.append(torch.stack([terms.logsumexp(0), *(
            torch.tensor(len(x)).to(x), x.max(), x.sum(), (2 * terms).logsumexp(0), w.sum(), w.max()
        )]))  # fmt: skip
    stats = torch.stack(rows, 1)
    upstream = torch.linspace(0.5, 1.5, len(u), dtype=u.dtype, device=u.device)
    return [*stats.detach(), *torch.autograd.grad((stats[0] * upstream).sum(), leaves)]


def _exact_weight(x):
    return RANKING.weight_of_rank((x[None, :] <= x[:, None]).sum(1).to(x.dtype), torch.tensor(len(x)))


def _histogram_weight(bins):
    def weight(x):
        low, per_logit, number = histogram_axis(x.min()[None], x.max()[None], torch.tensor([len(x)]).to(x), bins)[:, 0]
        position = ((x - low) * per_logit).clamp(0, bins)
        bin_of = position.long().clamp(max=bins - 1)
        count = torch.bincount(bin_of, minlength=bins).to(x.dtype)
        below = count.cumsum(0) - count
        u = (below[bin_of] + (position - bin_of) * (count[bin_of] - 1) + 1) / number
        return RANKING.weight(u, 1 - u)

    return weight


@pytest.mark.parametrize("bins", [0, 16, 256])
@pytest.mark.parametrize(
    "n, m, d, images, reason",
    [
        (6, None, 3, 3, "smaller than a vector"),
        (70, None, 9, 35, "several tiles in the interpreter"),
        (68, 131, 5, 34, "two sets, images in a part of the columns"),
        (37, 700, 4, 0, "more columns than a kernel takes at once, rows not a multiple of a strip"),
    ],
)
def test_statistics_and_gradients_follow_the_definition(run, n, m, d, images, reason, bins):
    backend, device = run
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and m == 700:
        pytest.skip("half a minute in the interpreter, whose tiles are all of one kind")
    u = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, device=device))
    v = None if m is None else torch.nn.functional.normalize(torch.randn(m, d, dtype=torch.float64, device=device))
    offset = 0 if m is None else 3
    keep = torch.ones(n, m or n, dtype=torch.bool, device=device)
    if images:
        i, j = torch.arange(n, device=device)[:, None], torch.arange(m or n, device=device)[None, :] - offset
        keep = ((j - i) % images != 0) | (j < 0) | (j >= n)
    expected = _dense(u, v, keep, 3.0, _histogram_weight(bins) if bins else _exact_weight)
    for unit in (True,) if interpreted else (True, False):
        ours = _ranked(
            backend, u, v, bins=bins, scale=3.0, num_images=images, positive_offset=offset if images else 0, unit=unit
        )
        _assert_same(ours, expected)


@pytest.mark.parametrize("bins", [0, 32])
def test_ids_and_padding_leave_the_ranking(run, bins):
    backend, device = run
    u, v = (torch.randn(k, 5, dtype=torch.float64, device=device) for k in (40, 90))
    row_ids, col_ids = (torch.randint(0, 6, (k,), device=device) for k in (40, 90))
    col_ids[::7] = NO_IDS
    keep = (row_ids[:, None] != col_ids[None, :]) & (col_ids != NO_IDS)[None, :]
    expected = _dense(u, v, keep, 1.0, _histogram_weight(bins) if bins else _exact_weight)
    _assert_same(_ranked(backend, u, v, bins=bins, row_ids=row_ids, col_ids=col_ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_numbers_are_ranked_right(run, dtype):
    """One feature: the logits are the numbers. Signs, zeros of both signs, subnormal and neighbouring numbers, ties."""
    backend, device = run
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    x = torch.cat(
        [
            torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + eps, 1 - eps / 2, -1 - eps, tiny, -tiny, 20.0, -1e30, -3.0]).to(
                dtype
            ),
            torch.randn(300, dtype=dtype).round(decimals=1),  # many ties
            torch.randn(300, dtype=dtype) * 10.0 ** torch.randint(-30, 1, (300,)),
        ]
    ).to(device)[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    keep = torch.ones(1, len(x), dtype=torch.bool, device=device)
    expected = _dense(one.double(), x.double(), keep, 1.0, _exact_weight)
    ours = _ranked(backend, one, x)
    close = CLOSE if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
    weights = [ours[i] for i in (1, 5, 6)]
    _assert_same([w.double() for w in weights], [expected[i] for i in (1, 5, 6)], **(close | {"atol": 1e-9}))
    _assert_same([ours[-1].double()], [expected[-1]], **close)


@pytest.mark.parametrize("kind", ["spread out", "beside a far one", "equal beside a far one", "neighbours"])
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 40, 255, 700, 2049, 5000])
def test_rows_of_any_length_are_ranked_right(run, m, kind):
    """As above; a far number leaves the others a small part of the row's range, neighbours are next to each other in
    float32. Every third column is left out."""
    backend, device = run
    if backend == "triton" and device.type == "cpu" and m > 256:
        pytest.skip("half a minute in the interpreter, whose tiles are all of one kind")
    if kind == "neighbours":
        x = 0.5 + torch.randint(12, (m, 1)) * 2.0**-24
    else:
        x = {"spread out": 1.0, "beside a far one": 1e-6}.get(kind, 0.0) * torch.randn(m, 1)
    x[m // 2] = 1.0
    x = x.to(device)
    ids = (torch.arange(m, device=device) + 1) % 3
    keep = ids[None, :] != 0
    if not keep.any():
        keep, ids = ~keep, 1 + ids
    one = torch.ones(1, 1, device=device)
    expected = _dense(one.double(), x.double(), keep, 1.0, _exact_weight)
    ours = _ranked(backend, one, x, row_ids=0 * ids[:1], col_ids=ids)
    for i in (0, 1, 5, 6):  # lse, count, sum and largest of the weights
        _assert_same([ours[i].double()], [expected[i]], rtol=2e-5, atol=1e-6)
    _assert_same([ours[-1].double()], [expected[-1]], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["two_view", "one_way", "symmetric"])
def test_ties_share_the_largest_rank(run, layout, dtype):
    """Vectors of small integers: their products are exact in every library, and most are equal."""
    backend, device = run
    z1, z2 = torch.randint(-1, 2, (2, 40, 6), device=device).to(dtype).unbind(0)
    results = []
    for name in (backend, "reference"):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = ce.fused_bayesian_loss(*leaves, 0.5, layout=layout, normalize=False, backend=name)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    _assert_same(*results, **(CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}))


@pytest.mark.parametrize("bins", [0, 8])
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1)])
def test_nothing_to_rank(run, rows, columns, bins):
    backend, device = run
    u, v = (torch.randn(k, 4, dtype=torch.float64, device=device) for k in (rows, columns))
    ours, expected = (_ranked(name, u, v, bins=bins) for name in (backend, "torch"))
    _assert_same(ours, expected)
    assert (ours[0] == -torch.inf).all() or columns


def test_one_negative_has_the_weight_of_the_highest_rank(run):
    backend, device = run
    z1, z2 = random_pairs(2, 6, torch.float64, device)
    u1, u2 = (torch.nn.functional.normalize(z) for z in (z1, z2))
    top = RANKING.weight_of_rank(*torch.ones(2, dtype=torch.float64)).to(device)
    pos, negative = 2 * (u1 * u2).sum(1), 2 * (u1 * u2.flip(0)).sum(1)
    expected = torch.log1p(top * torch.exp(negative - pos)).mean()
    for ranks in ("exact", "histogram"):
        ours = ce.fused_bayesian_loss(z1, z2, layout="one_way", ranks=ranks, backend=backend)
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("loss", RANKED, **ids_of)
def test_a_row_without_negatives_costs_nothing(run, loss):
    backend, device = run
    z1, z2 = random_pairs(1, 4, torch.float32, device)
    z1.requires_grad_()
    value = loss.function(z1, z2, backend=backend, **loss.parameters)
    value.backward()
    assert value.item() == 0.0 and z1.grad.eq(0).all()
    z2[0, 0] = math.nan
    assert loss.function(z1, z2, backend=backend, **loss.parameters).isnan()


def test_a_weight_of_zero_is_no_trap(run):
    """beta = 0 without eps gives the hardest negative weight 0; with one negative nothing is left to learn from."""
    backend, device = run
    for name in (backend, "reference"):
        z1, z2 = random_pairs(2, 4, torch.float64, device)
        z1.requires_grad_()
        call = {"layout": "one_way", "beta": 0.0, "eps": 0.0, "backend": name}
        loss = ce.fused_bayesian_loss(z1, z2, **call)
        loss.backward()
        assert loss.item() < 1e-12 and z1.grad.abs().max() < 1e-12
        assert ce.fused_bayesian_loss(*random_pairs(4, 4, torch.float64, device), **call).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("usage", [u for u in RANKED_USAGES if u.name != "moco"], ids=lambda u: u.name)
@pytest.mark.parametrize("loss", RANKED, **ids_of)
def test_bad_numbers_reach_the_loss(run, loss, usage, bad):
    backend, device = run
    z1, z2 = random_pairs(9, 4, torch.float32, device)
    z2, options = usage.options(z1, z2)
    z1[3, 1] = bad
    rows = loss.function(z1, z2, reduction="none", backend=backend, **options, **loss.parameters)
    assert not rows[3].isfinite()
    z1.requires_grad_()
    loss.function(z1, z2, backend=backend, **options, **loss.parameters).backward()
    assert not z1.grad[3].isfinite().all()


# --- histograms


@pytest.mark.parametrize("bins, loss_error, gradient_error", [(256, 4e-5, 1e-3), (1024, 1e-5, 5e-4)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("inputs", ["random", "peaked", "crowded"])
def test_histograms_are_as_close_as_documented(run, inputs, temperature, bins, loss_error, gradient_error):
    backend, device = run
    if backend == "triton" and device.type == "cpu":
        pytest.skip("minutes in the interpreter; its histograms equal those of the others to rounding")
    z1, z2 = INPUTS[inputs](512, 64, torch.float64, device)
    if inputs == "crowded":
        unit = torch.nn.functional.normalize(z1)
        assert (unit @ unit.T).mean() > 0.98
    results = []
    for ranks in ("exact", "histogram"):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = ce.fused_bayesian_loss(*leaves, temperature, ranks=ranks, bins=bins, backend=backend)
        results.append((loss.item(), torch.cat(torch.autograd.grad(loss, leaves))))
    (exact, gradient), (approximate, approximate_gradient) = results
    assert 0 < abs(approximate - exact) <= loss_error
    assert (approximate_gradient - gradient).norm() <= gradient_error * gradient.norm()


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_histograms_are_the_same_on_every_backend(run, usage):
    backend, device = run
    results = []
    z1, z2 = random_pairs(17, 5, torch.float64, device)
    z2, options = usage.options(z1, z2)
    for name in (backend, "torch"):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = ce.fused_bayesian_loss(*leaves, 0.3, backend=name, reduction="none", **options, **HISTOGRAM.parameters)
        results.append([loss.detach(), *torch.autograd.grad(loss.square().sum(), leaves)])
    _assert_same(*results)


def test_equal_logits_have_the_highest_rank_in_a_histogram_too(run):
    backend, device = run
    ones = torch.ones(4, 3, dtype=torch.float64, device=device)
    exact, histogram = (ce.fused_bayesian_loss(ones, ones, ranks=r, backend=backend) for r in ("exact", "histogram"))
    torch.testing.assert_close(histogram, exact, **CLOSE)


# --- the loss


@pytest.mark.parametrize("layout", ["two_view", "one_way", "symmetric"])
def test_without_knowledge_it_is_infonce(run, layout):
    """alpha = beta = .5 and no eps: every negative has weight 1, whatever tau_plus is."""
    backend, device = run
    results = []
    z1, z2 = random_pairs(13, 6, torch.float64, device)
    for function, more in (
        (ce.fused_infonce_loss, {}),
        (ce.fused_bayesian_loss, {"alpha": 0.5, "beta": 0.5, "eps": 0.0}),
        (ce.fused_bayesian_loss, {"alpha": 0.5, "beta": 0.5, "eps": 0.0, "ranks": "histogram"}),
    ):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = function(*leaves, 0.3, layout=layout, backend=backend, **more)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    _assert_same(results[1], results[0])
    _assert_same(results[2], results[0])


@pytest.mark.parametrize(
    "case", [c for c in golden_files.cases("bcl") if c["min_gap_cos"] > 1e-5], ids=lambda c: c["case"]
)
def test_float32_matches_released_code_where_ranks_are_apart(run, case):
    backend, device = run
    golden = golden_files.load("bcl", case)
    z1, z2 = (golden[k].to(device, torch.float32).requires_grad_() for k in ("z1", "z2"))
    loss = ce.fused_bayesian_loss(z1, z2, case["t"], normalize=False, backend=backend, **golden_files.parameters(case))
    loss.backward()
    # an absolute error of the logits, about eps/t times their length, is a relative one of each term
    allowed = 16 * np.finfo(np.float32).eps / case["t"] * max(1.0, golden["z1"].square().sum(1).max().item())
    for ours, name in ((loss, "loss"), (z1.grad, "grad_z1"), (z2.grad, "grad_z2")):
        expected = golden[name]
        assert (ours.detach().cpu().double() - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_every_layout(run, usage):
    check_accuracy(EXACT, usage, "random", 17, 12, torch.float32, 0.3, run, reduction="none")


@pytest.mark.parametrize("inputs", ["random", "peaked"])
@pytest.mark.parametrize("temperature", [0.005, 0.07, 100.0])
def test_every_temperature_and_kind_of_input(run, temperature, inputs):
    check_accuracy(EXACT, RANKED_USAGES[0], inputs, 33, 17, torch.float32, temperature, run)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 100.0])
def test_crowded_batches_at_every_temperature(run, temperature):
    """In float64: in float32 their cosines are closer than rounding errors, and ranks a matter of chance."""
    backend, device = run
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        leaves = [z.requires_grad_() for z in crowded_pairs(33, 17, torch.float64, device)]
        loss = ce.fused_bayesian_loss(*leaves, temperature, backend=name)
        results.append([loss.detach(), *(grad * temperature for grad in torch.autograd.grad(loss, leaves))])
    _assert_same(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("usage", [RANKED_USAGES[0], RANKED_USAGES[2], RANKED_USAGES[-1]], ids=lambda u: u.name)
def test_every_dtype(run, usage, dtype):
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    check_accuracy(EXACT, usage, "random", 24, 32, dtype, 0.2, run, upstream=upstream)


@pytest.mark.parametrize("b, d, reason", SHAPES[:-1], ids=[f"{b}x{d}" for b, d, _ in SHAPES[:-1]])
@pytest.mark.parametrize("usage", [RANKED_USAGES[0], RANKED_USAGES[3], RANKED_USAGES[-1]], ids=lambda u: u.name)
def test_every_shape(run, usage, b, d, reason):
    check_accuracy(EXACT, usage, "random", b, d, torch.float64, 0.2, run)


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_gradcheck_every_layout_with_a_learnable_temperature(run, usage):
    """Ranks are constant around a point: away from ties the loss has the derivative of its formula."""
    backend, device = run
    z1, z2 = random_pairs(5, 4, torch.float64, device)
    z2, options = usage.options(z1, z2)
    options |= EXACT.parameters | {"backend": backend}
    temperature = torch.tensor(0.7, dtype=torch.float64, device=device)
    check_gradients(lambda a, b, t: ce.fused_bayesian_loss(a, b, t, **options), z1, z2, temperature)


def test_gradcheck_shared_negatives(run):
    backend, device = run
    z1, z2 = random_pairs(4, 3, torch.float64, device)
    negatives = torch.randn(5, 3, dtype=torch.float64, device=device)
    check_gradients(lambda x: ce.fused_bayesian_loss(z1, z2, layout="one_way", negatives=x, backend=backend), negatives)


def test_second_derivatives_only_from_the_reference(run):
    backend, device = run
    z1, z2 = random_pairs(4, 3, torch.float64, device)
    z1.requires_grad_()
    (grad,) = torch.autograd.grad(ce.fused_bayesian_loss(z1, z2, backend=backend), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda a: ce.fused_bayesian_loss(a, z2, 0.8, backend="reference"), z1)


@pytest.mark.parametrize("loss", RANKED, **ids_of)
@pytest.mark.parametrize("kind", ["module", "tensor"])
def test_queue_may_change_before_the_backward(run, kind, loss):
    """The queue as the only columns; the backward ranks again and must see what the forward saw."""
    backend, device = run
    z1, z2 = random_pairs(5, 4, torch.float64, device)
    keys, ids = torch.randn(8, 4, dtype=torch.float64, device=device), torch.arange(8, device=device)

    def gradient(before_backward):
        queue = ce.NegativeQueue(8, 4, dtype=torch.float64, device=device)
        queue.enqueue(keys, ids)
        columns = {"queue": queue} if kind == "module" else {"queue": ce.Columns(queue.data, ids=queue.ids)}
        anchors = z1.clone().requires_grad_()
        value = loss.function(
            anchors, z2, layout="one_way", in_batch_negatives=False, ids=ids[:5], backend=backend,
            **columns, **loss.parameters,
        )  # fmt: skip
        before_backward(queue)
        return torch.autograd.grad(value, anchors)[0]

    expected = gradient(lambda queue: None)
    assert expected.abs().max() > 1e-3
    assert torch.equal(gradient(lambda queue: queue.enqueue(-keys[:6], ids[2:])), expected)


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_statistics_are_those_of_the_reference(run, usage):
    check_statistics(run, EXACT, usage)


def test_statistics_of_the_weights_match_their_definition(run):
    backend, device = run
    z1, z2 = peaked_pairs(10, 6, torch.float64, device)
    z = torch.nn.functional.normalize(torch.cat([z1, z2]))
    index = torch.arange(20, device=device)
    keep = index[:, None] % 10 != index[None, :] % 10
    lse, _, _, _, squared, total, largest, _ = _dense(z, None, keep, 2.0, _exact_weight)
    stats = ce.fused_bayesian_loss(z1, z2, return_stats=True, backend=backend)[1].to_dict()
    assert stats["mean_weight"] == pytest.approx((total / 18).mean().item())
    assert stats["max_weight"] == pytest.approx(largest.mean().item())
    assert stats["effective_negatives"] == pytest.approx((2 * lse - squared).exp().mean().item())


@pytest.mark.parametrize(
    "loss, usage",
    [(EXACT, RANKED_USAGES[0]), (HISTOGRAM, RANKED_USAGES[2]), (EXACT, RANKED_USAGES[-1])],
    ids=["two_view", "histogram_and_queue", "symmetric"],
)
def test_compiles_into_one_graph(run, loss, usage):
    check_one_graph(run, loss, usage)


@pytest.mark.parametrize("loss", RANKED, **ids_of)
def test_autocast_changes_nothing(run, loss):
    check_autocast_changes_nothing(run, loss, torch.bfloat16)


@pytest.mark.parametrize("ranks", ["exact", "histogram"])
def test_results_repeat_bit_for_bit(run, ranks):
    backend, device = run
    z1, z2 = crowded_pairs(20 if backend == "triton" else 90, 16, torch.float32, device)
    z1.requires_grad_()

    def once():
        loss = ce.fused_bayesian_loss(z1, z2, ranks=ranks, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, z1)]

    before = torch.get_num_threads()
    for threads in (1, 2):  # on another number the matrix library may round otherwise
        torch.set_num_threads(threads)
        results = once(), once()
        torch.set_num_threads(before)
        assert all(map(torch.equal, *results))


def test_auto_depends_on_the_number_of_candidates_and_explain_says_so():
    for candidates, expected in ((AUTO_EXACT_CANDIDATES, "exact"), (AUTO_EXACT_CANDIDATES + 2, "histogram")):
        assert ce.Bayesian().ranking(candidates).bins == (0 if expected == "exact" else 256)
        z = torch.empty(candidates // 2, 1)
        assert ce.explain(z).ranks == expected
        assert f"takes {expected!r}" in str(ce.explain(z))
    assert ce.Bayesian(ranks="histogram", bins=64).ranking(3).bins == 64
    assert ce.Bayesian(ranks="exact").ranking(10**9).bins == 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"alpha": 0.4}, r"alpha.*\[0.5, 1\]; got 0.4"),
        ({"alpha": 1.1}, "got 1.1"),
        ({"beta": -0.1}, r"beta.*\[0, 1\]; got -0.1"),
        ({"beta": 1.5}, "got 1.5"),
        ({"alpha": 1.0, "beta": 1.0}, "weight 0"),
        ({"tau_plus": 1.0}, r"\[0, 1\); got 1.0"),
        ({"eps": -1e-3}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"alpha": 1.0, "tau_plus": 0.0, "eps": 0.0}, "give eps > 0"),
        ({"ranks": "sorted"}, "auto, exact, histogram; got 'sorted'"),
        ({"bins": 1}, "bins"),
        ({"bins": 2.5}, "bins"),
        ({"negatives": torch.randn(4, 2, 3), "layout": "one_way"}, r"\[K, D\]"),
        (
            {"negatives": torch.randn(5, 3), "layout": "one_way", "guide": (torch.randn(4, 2), torch.randn(4, 2))},
            "score the negatives too",
        ),
    ],
)
def test_refuses(arguments, says):
    z1, z2 = random_pairs(4, 3)
    with pytest.raises(ValueError, match=says):
        ce.fused_bayesian_loss(z1, z2, **arguments)


def test_a_weight_of_zero_far_above_the_others(run):
    """beta = eps = 0 gives the highest rank weight 0; e^ its logit may overflow beside the others' sum."""
    z1 = torch.tensor([[1.0, 0.0]], device=run[1], requires_grad=True)
    z2, queue = torch.tensor([[0.0, 1.0]], device=run[1]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=run[1])
    how = {"layout": "one_way", "in_batch_negatives": False, "backend": run[0]}
    loss = ce.fused_bayesian_loss(z1, z2, 0.01, beta=0.0, eps=0.0, queue=queue, **how)
    assert loss.item() < 1e-40
    assert torch.autograd.grad(loss, z1)[0].abs().max() < 1e-30


def _far_above_the_others(dtype, device):
    """An anchor, its positive and 49 candidates: one with cosine 1, the others 140 logits below it at t = .005."""
    angles = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(1.2661, 3.1, 48, dtype=torch.float64)])
    negatives = torch.stack([angles.cos(), angles.sin()], 1)
    z1, z2 = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[0.1, 0.99**0.5]], dtype=dtype)
    return [x.to(device, dtype).requires_grad_() for x in (z1, z2, negatives)]


@pytest.mark.parametrize("frozen", [True, False], ids=["queue", "negatives"])
@pytest.mark.parametrize("bins", [0, 7, 256])
def test_a_highest_rank_of_weight_zero_hides_no_other(run, bins, frozen):
    """alpha = .5 and beta = eps = tau_plus = 0: omega = 2 (1 - u), exactly 0 for the highest rank alone."""
    how = {"ranks": "histogram", "bins": bins} if bins else {"ranks": "exact"}
    how |= {"tau_plus": 0.0, "alpha": 0.5, "beta": 0.0, "eps": 0.0, "return_stats": True}

    def called(dtype, device, backend):
        z1, z2, negatives = _far_above_the_others(dtype, device)
        candidates = {"queue": negatives.detach()} if frozen else {"negatives": negatives}
        loss, stats = ce.fused_bayesian_loss(
            z1, z2, 0.005, layout="one_way", in_batch_negatives=False, backend=backend, **how, **candidates
        )
        leaves = [z1, z2] if frozen else [z1, z2, negatives]
        return loss.detach(), torch.autograd.grad(loss, leaves), stats.to_dict()

    loss, gradients, stats = called(torch.float32, run[1], run[0])
    truth, true_gradients, true_stats = called(torch.float64, run[1], "reference")
    assert truth > 30
    relative = 32 * torch.finfo(torch.float32).eps * 200  # of every weight: that of a logit
    torch.testing.assert_close(loss.double(), truth, rtol=relative, atol=0)
    for ours, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=relative * true.abs().max().item())
    for name, true in true_stats.items():
        assert stats[name] == pytest.approx(true, rel=relative, abs=1e-5), name


@pytest.mark.parametrize("ranks", ["exact", "histogram"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_negatives_of_weight_zero_are_no_effective_negatives(run, ranks, backend):
    z1, z2 = random_pairs(2, 5, torch.float32, run[1])
    how = {"layout": "one_way", "ranks": ranks, "backend": backend or run[0], "return_stats": True}
    loss, stats = ce.fused_bayesian_loss(z1, z2, 0.5, beta=0.0, eps=0.0, **how)
    assert loss == 0 and stats.effective_negatives == 0 and stats.max_weight == 0
    _, stats = ce.fused_bayesian_loss(z1, z2, 0.5, **how)
    assert stats.effective_negatives.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda x: x.name)
def test_the_reference_has_the_histogram_that_is_streamed(run, usage):
    z1, z2 = random_pairs(9, 6, torch.float64, run[1])
    z2, options = usage.options(z1, z2)
    call = options | {"temperature": 0.3, "reduction": "none", "alpha": 0.8, "beta": 0.6}
    for bins in (2, 5):
        values = []
        for backend in ("reference", run[0]):
            leaves = [x.detach().clone().requires_grad_() for x in (z1, z2)]
            loss = ce.fused_bayesian_loss(*leaves, ranks="histogram", bins=bins, backend=backend, **call)
            values.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
        _assert_same(*values)
        exact = ce.fused_bayesian_loss(z1, z2, ranks="exact", backend="reference", **call)
        assert (exact - values[0][0]).abs().max() > 1e-4
