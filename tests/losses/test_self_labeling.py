"""SANE: golden cases, the labels themselves, the error rule, and everything that must stay constant."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
import golden_files
from accuracy import assert_as_accurate_as_dense, evaluate, on_rounded_operands
from peak_memory import needs_proc, peak_growth
from rows import INPUTS, peaked_pairs

CASES = golden_files.cases("sane")
loss_of = ce.fused_self_labeling_loss


def _golden(case: dict, device) -> tuple[dict[str, torch.Tensor], dict]:
    arrays = {name: x.to(device) for name, x in golden_files.load("sane", case).items()}
    options = {"temperature": case["t"], "label_temperature": case["tau_prime"], "mu": case["mu"], "lam": case["lam"]}
    return arrays, options | {"normalize": False, "perm": arrays["perm"], "theta": arrays["theta"]}


def _check_golden(case, backend, device):
    golden, options = _golden(case, device)
    q, q_mix = golden["q"].requires_grad_(), golden["qmix"].requires_grad_()
    loss, stats = loss_of(q, golden["k"], golden["queue"], q_mix, **options, backend=backend, return_stats=True)
    loss.backward()
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(loss, golden["loss"], **close)
    torch.testing.assert_close(q.grad, golden["grad_q"], **close)
    torch.testing.assert_close(q_mix.grad, golden["grad_qmix"], **close)
    torch.testing.assert_close(stats.alpha, golden["alpha"].mean(), **close)
    torch.testing.assert_close(stats.beta, golden["beta"].mean(), **close)
    torch.testing.assert_close(stats.own_weight, golden["ybar"].diagonal().mean(), **close)
    entropy = -torch.special.xlogy(golden["ybar"], golden["ybar"]).sum(1).mean()
    torch.testing.assert_close(stats.label_entropy, entropy, **close)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_matches_golden(run, case):
    _check_golden(case, *run)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_reference_matches_golden(case):
    _check_golden(case, "reference", torch.device("cpu"))


def _batch(s, d, dtype=torch.float64, device="cpu", queue_size=7, inputs="random") -> tuple[torch.Tensor, ...]:
    """q, k, queue, q_mix, perm, theta."""
    q, k = INPUTS[inputs](s, d, torch.float64)
    queue = F.normalize(torch.randn(queue_size, d, dtype=torch.float64), dim=1)
    perm, theta = torch.randperm(s), torch.rand(s, dtype=torch.float64)
    q_mix = torch.lerp(q[perm], q, theta[:, None]) + 0.01 * torch.randn(s, d, dtype=torch.float64)
    made = [x.to(device, dtype) for x in (q, k, queue, q_mix)]
    return (*made, perm.to(device), theta.to(device))


def _mixed_labels(backend, k, queue, q_mix, perm, theta, temperature=0.2, **options) -> torch.Tensor:
    """[s, s + K] the labels y', read off the gradient (softmax - y') keys / t, for as many keys as features."""
    keys, x = torch.cat([k, queue]), q_mix.detach().clone().requires_grad_()
    call = {"temperature": temperature, "lam": 1.0, "normalize": False, "reduction": "sum", "backend": backend}
    loss = loss_of(q_mix.detach(), k, queue, x, perm, theta, **call, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return (q_mix @ keys.T / temperature).softmax(1) - temperature * grad @ keys.inverse()


def _paper_labels(k, queue, temperature, mu) -> torch.Tensor:
    """[s, s + K] ybar, image by image."""
    rows = []
    for i in range(len(k)):
        x = torch.cat([k, queue]) @ k[i] / temperature
        p, without = x.softmax(0), x.clone()
        without[i] = -torch.inf
        q = without.softmax(0)
        z = 1 + mu * p.max() + mu * q.max()
        alpha, beta = mu * p.max() / z, mu * q.max() / z
        rows.append((1 - alpha - beta) * F.one_hot(torch.tensor(i, device=x.device), len(x)) + alpha * p + beta * q)
    return torch.stack(rows)


@pytest.mark.parametrize("label_temperature, mu", [(0.8, 1.0), (0.15, 10.0), (1e-3, 1.0)])
def test_labels_are_the_papers(run, label_temperature, mu):
    backend, device = run
    _, k, queue, q_mix, perm, theta = _batch(5, 12, device=device)
    k = F.normalize(k)
    options = {"label_temperature": label_temperature, "mu": mu}
    ours = _mixed_labels(backend, k, queue, F.normalize(q_mix), perm, theta, **options)
    one = _paper_labels(k, queue, 0.2 * label_temperature, mu)
    expected = theta[:, None] * one + (1 - theta[:, None]) * one[perm]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.sum(1), torch.ones_like(theta), rtol=1e-10, atol=1e-10)


def test_without_mu_labels_are_one_hot(run):
    backend, device = run
    _, k, queue, q_mix, _, _ = _batch(4, 11, device=device)
    alone = {"perm": torch.arange(4, device=device), "theta": 1.0}
    ours = _mixed_labels(backend, k, queue, F.normalize(q_mix), mu=0.0, **alone)
    torch.testing.assert_close(ours, torch.eye(4, 11, dtype=ours.dtype, device=device), rtol=0, atol=1e-9)


def test_at_label_temperature_zero_labels_sit_on_the_own_key_and_the_nearest(run):
    backend, device = run
    _, k, queue, q_mix, _, _ = _batch(4, 11, device=device)
    k = F.normalize(k)
    nearest = (k @ torch.cat([k, queue]).T).fill_diagonal_(-1).argmax(1)
    alone = {"perm": torch.arange(4, device=device), "theta": 1.0}
    ours = _mixed_labels(backend, k, queue, F.normalize(q_mix), label_temperature=1e-6, mu=1.0, **alone)
    expected = torch.eye(4, 11, dtype=ours.dtype, device=device) * 2 / 3  # z = 3, alpha = beta = 1/3
    expected[torch.arange(4, device=device), nearest] = 1 / 3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["queue", "no queue"])
def test_without_mixed_inputs_it_is_infonce(run, layout):
    backend, device = run
    q, k, queue, *_ = _batch(6, 4, device=device)
    queue = queue if layout == "queue" else None
    results = []
    for function in (
        lambda x: loss_of(x, k, queue, temperature=0.3, backend=backend),
        lambda x: ce.fused_infonce_loss(x, k, 0.3, layout="one_way", queue=queue, backend=backend),
    ):
        x = q.clone().requires_grad_()
        results.append([function(x), *torch.autograd.grad(function(x), x)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


VECTORS = ("q", "k", "q_mix")


def _check(run, inputs, s, d, dtype, temperature, *, label_temperature=0.8, mu=1.0, queue_size=7, upstream=1.0):
    backend, device = run
    q, k, queue, q_mix, perm, theta = _batch(s, d, dtype, device, queue_size, inputs)
    theta = theta.float()
    leaves = {"q": q, "q_mix": q_mix}
    options = {"temperature": temperature, "label_temperature": label_temperature, "mu": mu, "perm": perm}
    options |= {"theta": theta, "k": k, "queue": queue}
    ours = evaluate(loss_of, leaves, upstream, backend=backend, **options)
    dense = evaluate(loss_of, leaves, upstream, backend="reference", **options)
    exact = on_rounded_operands(loss_of, True, VECTORS)
    truth = evaluate(exact, {n: x.double() for n, x in leaves.items()}, upstream, dtype=dtype, **options)
    units = {n: ce.numerics.normalize(x.double()) for n, x in (leaves | {"k": k}).items()}
    options |= {"k": units.pop("k"), "queue": queue.double()}
    at_units = evaluate(loss_of, units, upstream, normalize=False, backend="reference", **options)
    lengths = {n: x.double().norm(dim=1) for n, x in leaves.items()}
    terms = {n: at_units.grads[n].abs().max().item() / x[x > 0].min().item() for n, x in lengths.items()}
    logit = 1 / (temperature * min(1.0, label_temperature))
    if backend == "triton" and dtype == torch.float16:
        # the labels' mean keys come from 16-bit exponentials: an error of the targets, as large as rounding them
        allowed = torch.finfo(dtype).eps / temperature
        assert (ours.loss.double() - truth.loss).abs() <= allowed
        ours = type(ours)(truth.loss, ours.grads)
        terms = {n: x + allowed * upstream for n, x in terms.items()}
    assert_as_accurate_as_dense(ours, dense, truth, logit, terms, dtype)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("temperature", [0.01, 0.2, 100.0])
def test_every_temperature_and_kind_of_input(run, temperature, inputs):
    _check(run, inputs, 33, 17, torch.float32, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", ["random", "peaked"])
def test_every_dtype(run, inputs, dtype):
    upstream = 2.0**16 if dtype == torch.float16 else 1.0  # without a GradScaler float16 gradients underflow
    _check(run, inputs, 40, 32, dtype, 0.2, queue_size=50, upstream=upstream)


@pytest.mark.parametrize("temperature, label_temperature", [(0.2, 0.15), (0.05, 0.6)])
@pytest.mark.parametrize("inputs", ["random", "peaked", "crowded"])
def test_sharp_labels_stay_exact(run, inputs, temperature, label_temperature):
    """t t' = .03: a label made as "softmax without the own key, renormalised" is NaN here."""
    _check(run, inputs, 24, 16, torch.float32, temperature, label_temperature=label_temperature, queue_size=29)


@pytest.mark.parametrize("s, d, queue_size", [(2, 1, 1), (3, 5, 1), (257, 130, 33)])
def test_every_shape(run, s, d, queue_size):
    _check(run, "random", s, d, torch.float32, 0.2, queue_size=queue_size)


def test_converged_batch_keeps_its_relative_accuracy(run):
    """Nearly unmixed pairs of a converged model: a loss of 1e-3 is right to rounding of its logits on both sides."""
    backend, device = run
    q, k = peaked_pairs(64, 64, torch.float32, device)
    queue = F.normalize(torch.randn(100, 64, device=device), dim=1)
    perm = torch.randperm(64, device=device)
    for theta, q_mix in ((1.0, q), (0.0, q[perm])):
        call = {"temperature": 0.08, "mu": 0.0, "lam": 1.0, "reduction": "none", "perm": perm, "theta": theta}
        ours = loss_of(q, k, queue, q_mix, backend=backend, **call)
        truth = loss_of(*(x.double() for x in (q, k, queue, q_mix)), backend="reference", **call)
        # the dense formula in float64 has an absolute error of an ulp of the logits: not in the way at a loss of 1e-4
        assert 1e-5 < truth.mean().item() < 5e-3
        assert ((ours.double() - truth).abs() <= 2e-6 / 0.08 * truth.abs()).all()


def test_gradcheck(run):
    backend, device = run
    q, k, queue, q_mix, perm, theta = _batch(3, 2, device=device, queue_size=5)

    def function(q, q_mix, temperature):
        # the labels are constants: their temperature t t' has to stay put while t moves
        label_temperature = 0.16 / temperature.item()
        options = {"label_temperature": label_temperature, "mu": 2.0, "lam": 0.3, "backend": backend}
        return loss_of(q, k, queue, q_mix, perm, theta, temperature, reduction="none", **options)

    temperature = torch.tensor(0.4, dtype=torch.float64, device=device)
    leaves = [x.clone().requires_grad_() for x in (q, q_mix, temperature)]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_only_the_student_gets_a_gradient(backend):
    leaves = [x.requires_grad_() for x in _batch(5, 4)[:4]]
    q, k, queue, q_mix = leaves
    perm, theta = torch.randperm(5), torch.rand(5, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss_of(q, k, queue, q_mix, perm, theta, temperature, backend=backend).backward()
    assert all(x.grad is not None and x.grad.ne(0).any() for x in (q, q_mix, temperature))
    assert k.grad is None and queue.grad is None and theta.grad is None


def test_second_derivatives():
    q, k, queue, q_mix, perm, theta = _batch(3, 3)
    leaves = [x.requires_grad_() for x in (q, q_mix)]

    def function(q, q_mix, backend="reference"):
        return loss_of(q, k, queue, q_mix, perm, theta, 0.7, backend=backend)

    assert torch.autograd.gradgradcheck(function, leaves)
    (grad,) = torch.autograd.grad(function(*leaves, backend="torch"), q_mix, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()


def test_queue_wraps_and_its_unfilled_rows_are_no_keys(run):
    backend, device = run
    queue = ce.NegativeQueue(13, 4, dtype=torch.float64, device=device)
    seen = torch.empty(0, 4, dtype=torch.float64, device=device)
    for _ in range(5):  # 5 rows a step: sizes 0, 5, 10, 13, 13
        q, k, _, q_mix, perm, theta = _batch(5, 4, device=device)
        call = {"q_mix": q_mix, "perm": perm, "theta": theta, "backend": backend, "return_stats": True}
        ours, stats = loss_of(q, k, queue, **call)
        kept = seen[-13:]
        expected, wanted = loss_of(q, k, kept if len(kept) else None, **call)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
        assert stats.keys.item() == wanted.keys.item() == 5 + len(kept)
        queue.enqueue(F.normalize(k))
        seen = torch.cat([seen, F.normalize(k)])


def test_checkpoint_restores_the_queue():
    q, k, _, q_mix, perm, theta = _batch(5, 4, torch.float32)
    criterion = ce.SelfLabelingLoss(queue=ce.NegativeQueue(13, 4))
    for _ in range(4):
        criterion.queue.enqueue(F.normalize(torch.randn(5, 4)))
    restored = ce.SelfLabelingLoss(queue=ce.NegativeQueue(13, 4))
    restored.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for module in (criterion, restored):
        module.queue.enqueue(F.normalize(k))
    assert torch.equal(criterion(q, k, q_mix, perm, theta), restored(q, k, q_mix, perm, theta))


def test_queue_may_change_before_the_backward(run):
    backend, device = run
    q, k, queue, q_mix, perm, theta = _batch(5, 4, device=device)
    expected = _gradients(q, k, queue, q_mix, perm, theta, backend)
    assert all(map(torch.equal, expected, _gradients(q, k, queue.clone(), q_mix, perm, theta, backend, torch.zero_)))


def _gradients(q, k, queue, q_mix, perm, theta, backend, before_backward=lambda queue: None):
    leaves = [x.detach().clone().requires_grad_() for x in (q, q_mix)]
    loss = loss_of(leaves[0], k, queue, leaves[1], perm, theta, backend=backend)
    before_backward(queue)
    return [loss, *torch.autograd.grad(loss, leaves)]


def test_reruns_are_bitwise_equal_and_autocast_changes_nothing(run):
    backend, device = run
    batch = _batch(40, 8, torch.float32, device, queue_size=90)
    first = _gradients(*batch, backend)
    assert all(map(torch.equal, first, _gradients(*batch, backend)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert all(map(torch.equal, first, _gradients(*batch, backend)))


def test_many_tiles(run):
    backend, device = run
    batch = _batch(300, 16, device=device, queue_size=1301)
    ours, expected = _gradients(*batch, backend), _gradients(*batch, "reference")
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("return_stats", [False, True])
def test_reductions_agree_with_none(run, return_stats):
    backend, device = run
    batch = _batch(6, 4, device=device)
    rows = loss_of(*batch, reduction="none", backend=backend)
    assert rows.shape == (6,)
    for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum())):
        value = loss_of(*batch, reduction=reduction, backend=backend, return_stats=return_stats)
        torch.testing.assert_close(value[0] if return_stats else value, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mixed", [True, False])
def test_backends_report_what_the_reference_reports(run, mixed):
    backend, device = run
    batch = _batch(9, 5, device=device, inputs="peaked")[: None if mixed else 3]
    ours = loss_of(*batch, return_stats=True, backend=backend)[1].to_dict()
    expected = loss_of(*batch, return_stats=True, backend="reference")[1].to_dict()
    assert ours == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_record_matches_its_definition():
    q, k, queue, q_mix, perm, theta = _batch(9, 5)
    loss, stats = loss_of(q, k, queue, q_mix, perm, theta, mu=3.0, lam=0.25, return_stats=True)
    q, k = F.normalize(q), F.normalize(k)
    y = _paper_labels(k, queue, 0.16, 3.0)
    similarity = q @ torch.cat([k, queue]).T
    infonce = F.cross_entropy(similarity / 0.2, torch.arange(9))
    logits = F.normalize(q_mix) @ torch.cat([k, queue]).T / 0.2
    mixed = F.cross_entropy(logits, theta[:, None] * y + (1 - theta[:, None]) * y[perm])
    expected = {
        "instance_loss": infonce,
        "mixed_loss": mixed,
        "accuracy": (similarity.argmax(1) == torch.arange(9)).double().mean(),
        "positive_similarity": similarity.diagonal().mean(),
        "own_weight": y.diagonal().mean(),
        "label_entropy": torch.special.entr(y).sum(1).mean(),
        "keys": 16.0,
    }
    record = stats.to_dict()
    assert {name: record[name] for name in expected} == pytest.approx({n: float(x) for n, x in expected.items()})
    assert loss.item() == pytest.approx(float(0.75 * infonce + 0.25 * mixed))
    assert 0 < record["alpha"] < 1 and 0 < record["beta"] < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(4), ids=["q", "k", "queue", "q_mix"])
def test_bad_numbers_reach_the_loss(run, where, bad):
    backend, device = run
    batch = _batch(6, 4, torch.float32, device)
    batch[where][1, 2] = bad
    assert not loss_of(*batch, backend=backend).isfinite()


def test_zero_vectors_get_zero_gradients(run):
    backend, device = run
    q, k, queue, q_mix, perm, theta = _batch(6, 4, torch.float32, device)
    q[2], q_mix[4], k[1] = 0, 0, 0
    loss, *grads = _gradients(q, k, queue, q_mix, perm, theta, backend)
    assert loss.isfinite() and grads[0][2].eq(0).all() and grads[1][4].eq(0).all()
    assert all(g.isfinite().all() for g in grads)


def test_one_image_needs_a_queue(run):
    backend, device = run
    q, k, queue, q_mix, perm, theta = _batch(1, 4, device=device)
    assert loss_of(q, k, queue, q_mix, perm, theta, backend=backend).item() > 0
    with pytest.raises(ValueError, match="no key to compare with"):
        loss_of(q, k, None, q_mix, perm, theta, backend=backend)


def test_an_image_without_other_keys_costs_nothing(run, monkeypatch):
    """What an unfilled queue and one image mean where asking the device would wait for it."""
    backend, device = run
    q, k, _, q_mix, perm, theta = _batch(1, 4, device=device)
    queue = ce.NegativeQueue(3, 4, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="enqueue keys"):
            loss_of(q, k, queue, q_mix, perm, theta, backend=backend)
    monkeypatch.setattr("contrastive_ext.losses.self_labeling._is_empty", lambda queue: False)
    for value in _gradients(q, k, queue, q_mix, perm, theta, backend):
        assert value.abs().max() <= 1e-15
    stats = loss_of(q, k, queue, q_mix, perm, theta, backend=backend, return_stats=True)[1].to_dict()
    assert stats["own_weight"] == 1 and stats["label_entropy"] == 0 and stats["keys"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("theta", ["vector", "number"])
def test_nothing_waits_for_the_gpu(run, theta):
    backend, device = run
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for on the CPU")
    q, k, _, q_mix, perm, vector = _batch(64, 32, torch.float32, device)
    queue, temperature = ce.NegativeQueue(64, 32, device=device), torch.tensor(0.2, device=device, requires_grad=True)
    q.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = vector if theta == "vector" else 0.3
        loss_of(q, k, queue, q_mix, perm, weights, temperature, backend=backend, return_stats=True)[0].backward()
        queue.enqueue(k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_is_compiled_whole():
    batch = _batch(6, 4, torch.float32)
    compiled = torch.compile(
        lambda *batch: loss_of(*batch, backend="torch", return_stats=True), fullgraph=True, backend="aot_eager"
    )
    value, stats = compiled(*batch)
    torch.testing.assert_close(value, loss_of(*batch, backend="torch"))
    assert stats.keys.item() == 13


def test_module_equals_function():
    q, k, queue, q_mix, perm, theta = _batch(6, 4)
    module = ce.SelfLabelingLoss(0.3, mu=2.0, label_temperature=0.5, queue=queue)
    expected = loss_of(q, k, queue, q_mix, perm, theta, 0.3, mu=2.0, label_temperature=0.5)
    assert torch.equal(module(q, k, q_mix, perm, theta), expected)
    assert torch.equal(
        module(q, k, q_mix, perm, theta, mu=0.5, label_temperature=0.8),
        loss_of(q, k, queue, q_mix, perm, theta, 0.3, mu=0.5),
    )
    assert "mu=2.0" in repr(module)


@needs_proc
def test_peak_memory_does_not_hold_the_matrix(run):
    backend, device = run
    if device.type != "cpu" or backend == "triton":
        pytest.skip("measured on the CPU")
    setup = (
        "q, k, q_mix = (torch.randn(n, 128).requires_grad_() for _ in range(3)); queue = torch.randn(64 * n, 128); "
        "perm, theta = torch.randperm(n), torch.rand(n)"
    )
    call = f"ce.fused_self_labeling_loss(q, k, queue, q_mix, perm, theta, backend={backend!r}).backward()"
    growth = peak_growth(setup, call, small=8, large=1024)
    assert 0 < growth <= 120 * 2**20, f"{growth / 2**20:.0f} MiB; one of the three matrices is 260 MiB"


Z, PERM, THETA = torch.randn(4, 3), torch.arange(4), torch.rand(4)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"q": [[1.0]]}, TypeError, "q must be a tensor; got list"),
        ({"q": Z.long()}, TypeError, "got torch.int64"),
        ({"k": Z.double()}, TypeError, "q and k must share dtype and device"),
        ({"k": Z[:3]}, ValueError, r"k must be \[s, D\] like q; got \[3, 3\] and \[4, 3\]"),
        ({"q": Z[0]}, ValueError, r"\[N, D\]"),
        ({"q_mix": Z[:, :2]}, ValueError, "q_mix"),
        ({"queue": Z[:, :2]}, ValueError, r"\[K, 3\]"),
        ({"queue": Z[:0, :2]}, ValueError, r"\[K, 3\]"),
        ({"queue": [1.0]}, TypeError, "queue must be a tensor; got list"),
        ({"perm": None}, ValueError, "belong together"),
        ({"q_mix": None}, ValueError, "belong together"),
        ({"perm": PERM.float()}, ValueError, r"perm must be int64 \[4\]"),
        ({"perm": PERM + 1}, ValueError, "below 4; got 1 to 4"),
        ({"theta": THETA[:3]}, ValueError, r"theta must be floating-point \[4\]"),
        ({"theta": THETA + 1}, ValueError, r"theta must be in \[0, 1\]"),
        ({"theta": -0.5}, ValueError, "got -0.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"label_temperature": 0.0}, ValueError, "label_temperature must be > 0"),
        ({"mu": -1.0}, ValueError, "mu must be >= 0"),
        ({"mu": math.inf}, ValueError, "finite"),
        ({"lam": 1.5}, ValueError, "lam"),
        ({"reduction": "average"}, ValueError, "mean, sum, none"),
        ({"backend": "fastest"}, ValueError, "auto"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    batch = {"q": Z, "k": Z, "queue": Z, "q_mix": Z, "perm": PERM, "theta": THETA}
    with pytest.raises(error, match=says):
        loss_of(**(batch | arguments))
