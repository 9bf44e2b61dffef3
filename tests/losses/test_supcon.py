"""SupCon: the closed forms of other libraries, the dense formula, rows without positives, converged rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext as ce
from accuracy import assert_as_accurate_as_dense, evaluate
from contrastive_ext import numerics
from rows import INPUTS

fused = ce.fused_supcon_loss
LABELS = torch.tensor([0, 3, 0, 5, 3, 0, 7, 3, -2, -2, 9, 0, 3])  # 5, 7 and 9 stand alone


def _features(kind: str = "random", dtype=torch.float64, device="cpu", d: int = 6) -> Tensor:
    return INPUTS[kind](len(LABELS), d, dtype, device)[0]


@pytest.mark.parametrize("positives", ["out", "in"])
def test_matches_the_definition(run, positives):
    backend, device = run
    z, labels, t = _features(device=device).requires_grad_(), LABELS.to(device), 0.3
    unit = F.normalize(z, dim=1)
    expected = []
    for i in range(len(z)):
        own = [k for k in range(len(z)) if k != i]
        same = [k for k in own if labels[k] == labels[i]]
        logits = unit @ unit[i] / t
        if not same:
            expected.append(0 * z[i].sum())
            continue
        mean = logits[same].mean() if positives == "out" else logits[same].exp().mean().log()
        expected.append(logits[own].logsumexp(0) - mean)
    rows = fused(z, labels, t, positives, reduction="none", backend=backend)
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-12, atol=1e-12)
    mean = fused(z, labels, t, positives, backend=backend)
    torch.testing.assert_close(mean, torch.stack(expected).sum() / 10)
    got, wanted = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (mean, torch.stack(expected).sum() / 10))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_out_is_pytorch_metric_learnings(run):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    backend, device = run
    z, labels = _features(device=device), LABELS.to(device)
    torch.testing.assert_close(fused(z, labels, 0.2, backend=backend), losses.SupConLoss(temperature=0.2)(z, labels))


def test_in_is_solo_learns_up_to_the_number_of_positives(run):
    """Its loss is -log of the sum over positives; the paper's, and ours, of their mean."""
    backend, device = run
    labels = torch.arange(6, device=device).repeat(3)
    z = torch.randn(18, 5, dtype=torch.float64, device=device)
    e = torch.exp(F.normalize(z) @ F.normalize(z).T / 0.2)
    own, same = torch.eye(18, dtype=torch.bool, device=device), labels[:, None] == labels
    positive, negative = (e * (same & ~own)).sum(1), (e * ~same).sum(1)
    theirs = -torch.log(positive / (positive + negative)).mean()
    ours = fused(z, labels, 0.2, "in", backend=backend)
    torch.testing.assert_close(ours, theirs + torch.tensor(2.0, dtype=torch.float64).log().to(device))


@pytest.mark.parametrize("positives", ["out", "in"])
def test_labels_of_two_views_alone_are_infonce(run, positives):
    backend, device = run
    z1, z2 = INPUTS["random"](8, 5, torch.float64, device)
    labels = torch.randperm(8, device=device)
    ours = fused(torch.stack([z1, z2]), labels, 0.3, positives, backend=backend)
    torch.testing.assert_close(ours, ce.fused_infonce_loss(z1, z2, 0.3, backend=backend), rtol=1e-12, atol=1e-13)
    rows = fused(torch.stack([z1, z2]), labels, 0.3, positives, reduction="none", backend=backend)
    assert rows.shape == (2, 8)


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_rule(run, dtype, kind, positives):
    backend, device = run
    unit = F.normalize(_features(kind), dim=1).to(device, dtype)
    options = {"labels": LABELS.to(device), "positives": positives, "temperature": 0.05, "normalize": False}
    ours = evaluate(fused, {"features": unit}, 1.0, backend=backend, **options)
    dense = evaluate(fused, {"features": unit}, 1.0, backend="reference", **options)
    truth = evaluate(fused, {"features": unit.double()}, 1.0, backend="reference", **options)
    assert_as_accurate_as_dense(ours, dense, truth, 20.0, {}, dtype)


def test_nobody_has_a_positive(run):
    backend, device = run
    z = _features(device=device).requires_grad_()
    for positives in ("out", "in"):
        loss = fused(z, torch.arange(len(z), device=device), positives=positives, backend=backend)
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0.0
        assert grad.eq(0).all()


def test_one_class(run):
    backend, device = run
    z = _features(device=device).requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.int32, device=device)
    loss = fused(z, labels, positives="in", reduction="none", backend=backend)
    expected = torch.full_like(loss, len(z) - 1).log()  # the mean over everyone: log of their number
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss.sum(), z)[0].abs().max() < 1e-12


def test_bad_numbers_reach_the_loss(run):
    backend, device = run
    for at in (0, 3):  # a row of a class, a row that stands alone
        z = _features(device=device)
        z[at, 1] = torch.nan
        for positives in ("out", "in"):
            assert fused(z, LABELS.to(device), positives=positives, backend=backend).isnan()


def test_gradients_and_second_derivative(run):
    backend, device = run
    z, labels = _features(device=device, d=3).requires_grad_(), LABELS.to(device)
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    for positives in ("out", "in"):
        assert torch.autograd.gradcheck(lambda z, t, p=positives: fused(z, labels, t, p, backend=backend), (z, t))
        assert torch.autograd.gradgradcheck(lambda z, p=positives: fused(z, labels, 0.4, p, backend="reference"), z)
        (grad,) = torch.autograd.grad(fused(z, labels, 0.4, positives, backend=backend), z, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.sum().backward()


def test_stats_count_the_rows_left_out(run):
    backend, device = run
    z, labels = _features(device=device), LABELS.to(device)
    _, stats = fused(z, labels, return_stats=True, backend=backend)
    unit = F.normalize(z, dim=1)
    same = (labels[:, None] == labels) & ~torch.eye(13, dtype=torch.bool, device=device)
    mean = ((unit @ unit.T) * same).sum(1) / same.sum(1).clamp(min=1)
    expected = {"positives": same.sum() / 13, "skipped_rows": 3, "positive_similarity": mean.sum() / 10}
    assert stats.to_dict() == pytest.approx({name: float(x) for name, x in expected.items()})


def test_module_equals_function():
    z = _features()
    module = ce.SupConLoss(0.3, "in", reduction="sum")
    assert torch.equal(module(z, LABELS), fused(z, LABELS, 0.3, "in", reduction="sum"))
    scale = torch.tensor(4.0, dtype=torch.float64)
    assert torch.equal(module(z, LABELS, logit_scale=scale), fused(z, LABELS, 0.25, "in", reduction="sum"))
    assert "positives='in'" in repr(module)


@pytest.mark.parametrize(
    "features, labels, arguments, error, says",
    [
        (torch.ones(4), torch.ones(4).long(), {}, ValueError, r"\[N, D\] or \[V, B, D\]"),
        (torch.ones(4, 2).int(), torch.ones(4).long(), {}, TypeError, "float16"),
        (torch.ones(4, 2), torch.ones(4), {}, ValueError, "integers"),
        (torch.ones(4, 2), torch.ones(5).long(), {}, ValueError, r"integers \[4\]"),
        (torch.ones(2, 4, 2), torch.ones(8).long(), {}, ValueError, r"integers \[4\]"),
        (torch.ones(4, 2), torch.ones(4).long(), {"positives": "both"}, ValueError, "out, in"),
        (torch.ones(4, 2), torch.ones(4).long(), {"reduction": "max"}, ValueError, "mean, sum, none"),
        (torch.ones(4, 2), torch.ones(4).long(), {"temperature": -1.0}, ValueError, "> 0"),
        (torch.ones(4, 2), torch.ones(4).long(), {"queue": torch.eye(2)}, ValueError, "needs labels"),
        (torch.ones(4, 2), torch.ones(4).long(), {"queue": ce.Columns(torch.eye(3))}, ValueError, r"\[K, 2\]"),
        (
            torch.ones(4, 2),
            torch.ones(4).long(),
            {"queue": ce.Columns(torch.eye(2), ids=torch.arange(2), log_weight=torch.ones(2))},
            ValueError,
            "no guide or",
        ),
    ],
)
def test_bad_input_says_what_to_do(features, labels, arguments, error, says):
    with pytest.raises(error, match=says):
        fused(features, labels, **arguments)


@pytest.mark.parametrize("positives", ["out", "in"])
def test_float64_is_accurate_to_float64(run, positives):
    """The log of a number of positives was once taken in float32."""
    backend, device = run
    z, labels = torch.eye(4, dtype=torch.float64, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for name in (backend, "reference"):
        loss = fused(z, labels, 1.0, positives, reduction="none", backend=name)
        torch.testing.assert_close(loss, torch.full_like(loss, 3.0).log(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("positives, positives_of_a_row", [("in", 1), ("in", 3), ("out", 1)])
def test_converged_rows_keep_their_digits(run, positives, positives_of_a_row):
    """The reference once lost 3 % of the gradient of "in" in float32, all roads that of "out"."""
    backend, device = run
    t, d = 0.05, 16
    labels = torch.arange(12, device=device).repeat(1 + positives_of_a_row)
    centers = torch.linalg.qr(torch.randn(d, 12, dtype=torch.float64)).Q.T.repeat(1 + positives_of_a_row, 1)
    z = F.normalize(centers + 0.05 * torch.randn_like(centers), dim=1).to(device, torch.float32)

    def gradient(z, name):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(fused(z, labels, t, positives, normalize=False, reduction="sum", backend=name), z)[0]

    truth = gradient(z.double(), "reference")
    for name in (backend, "reference"):
        error = (gradient(z, name).double() - truth).norm() / truth.norm()
        # every weight is the exponential of a difference of two logits
        assert error < 2 * numerics.rounding_of_products(torch.float32, d) / t, name


def test_statistics_carry_no_gradient(run):
    backend, device = run
    z, labels = _features(device=device).requires_grad_(), LABELS.to(device)
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    for name in (backend, "reference"):
        for positives in ("out", "in"):
            _, stats = fused(z, labels, t, positives, return_stats=True, backend=name)
            assert not any(x.requires_grad for x in vars(stats).values())


@pytest.mark.parametrize("positives", ["out", "in"])
def test_a_queue_of_the_rows_left_out_gives_the_rows_left_in_the_same_loss(run, positives):
    """Columns are columns, whether they are rows of the batch or held; unlabelled keys are negatives of all."""
    backend, device = run
    z, labels = _features(device=device), LABELS.to(device)
    every = fused(z, labels, 0.3, positives, reduction="none", backend=backend)
    unit = F.normalize(z, dim=1)
    held = ce.Columns(unit[5:], ids=labels[5:])
    torch.testing.assert_close(
        fused(z[:5], labels[:5], 0.3, positives, queue=held, reduction="none", backend=backend), every[:5]
    )
    queue = ce.NegativeQueue(40, z.shape[1], dtype=z.dtype, device=device)
    empty = fused(z, labels, 0.3, positives, queue=queue, backend=backend)
    torch.testing.assert_close(empty, fused(z, labels, 0.3, positives, backend=backend))
    queue.enqueue(z)
    one_more_class = ce.Columns(unit, ids=torch.full_like(labels, 10**6))
    torch.testing.assert_close(
        fused(z, labels, 0.3, positives, queue=queue, backend=backend),
        fused(z, labels, 0.3, positives, queue=one_more_class, backend="reference"),
    )


def test_bad_numbers_in_a_queue_reach_the_loss(run):
    backend, device = run
    keys = torch.full((2, 6), torch.nan, dtype=torch.float64, device=device)
    held = ce.Columns(keys, ids=torch.tensor([99, 98], device=device))
    for name in (backend, "reference"):
        assert fused(_features(device=device), LABELS.to(device), queue=held, backend=name).isnan()
