"""fused_labelled_infonce_loss: its definition, the published library, what labels can be, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from peak_memory import needs_proc, peak_growth
from rows import INPUTS
from two_ranks import WORLD, on_both_ranks

fused = ce.fused_labelled_infonce_loss
LABELS = torch.tensor([0, 3, 0, 5, 3, 0, 7, 3, -2, -2, 9, 0, 3])  # 5, 7 and 9 stand alone


def _features(kind: str = "random", device="cpu") -> torch.Tensor:
    return INPUTS[kind](len(LABELS), 6, torch.float64, device)[0]


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
def test_is_pytorch_metric_learnings(run, kind):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    backend, device = run
    z, labels = _features(kind, device).requires_grad_(), LABELS.to(device)
    for name in (backend, "reference"):
        ours, theirs = fused(z, labels, 0.3, backend=name), losses.NTXentLoss(0.3)(z, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        got, wanted = (torch.autograd.grad(x, z)[0] for x in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


def test_a_label_for_each_pair_is_infonce(run):
    backend, device = run
    z1, z2 = (x.to(device) for x in INPUTS["random"](9, 6, torch.float64))
    labels = torch.arange(9, device=device)
    expected = ce.fused_infonce_loss(z1, z2, 0.2, backend=backend)
    torch.testing.assert_close(fused(torch.stack([z1, z2]), labels, 0.2, backend=backend), expected)


@pytest.mark.parametrize("labels", [[1, 2, 3, 4], [1, 1, 1, 1], [5]], ids=str)
def test_batches_that_tell_nothing_apart_have_loss_zero(run, labels):
    backend, device = run
    z = torch.randn(len(labels), 3, dtype=torch.float64, device=device, requires_grad=True)
    for name in (backend, "reference"):
        loss = fused(z, torch.tensor(labels, device=device), backend=name)
        assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()


def test_statistics_and_reductions(run):
    backend, device = run
    z, labels = _features(device=device), LABELS.to(device)
    loss, stats = fused(z, labels, 0.3, return_stats=True, backend=backend)
    rows = fused(z, labels, 0.3, reduction="none", backend=backend)
    number = stats.positives * len(LABELS)
    assert stats.skipped_rows == 3 and number == 4 * 3 * 2 + 2
    torch.testing.assert_close(rows.sum() / number, loss)
    torch.testing.assert_close(fused(z, labels, 0.3, reduction="sum", backend=backend), rows.sum())
    assert not rows[[3, 6, 10]].any()


def test_a_nan_reaches_the_loss(run):
    backend, device = run
    z = _features(device=device).clone()
    z[3] = torch.nan
    for name in (backend, "reference"):
        assert fused(z, LABELS.to(device), backend=name).isnan()


def test_gradcheck(run):
    backend, device = run
    keys = ce.Columns(F.normalize(torch.randn(5, 6, dtype=torch.float64, device=device)), ids=LABELS[:5].to(device))
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    z = _features(device=device).requires_grad_()
    call = lambda z, t: fused(z, LABELS.to(device), t, queue=keys, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, (z, t), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"queue": ce.Columns(torch.eye(2))}, "needs labels"),
        ({"labels": torch.arange(3)}, r"integers \[4\]"),
        ({"reduction": "max"}, "mean, sum, none"),
        ({"temperature": 0.0}, "> 0"),
    ],
)
def test_bad_input_says_what_to_do(arguments, says):
    with pytest.raises(ValueError, match=says):
        fused(**{"features": torch.ones(4, 2), "labels": torch.arange(4), **arguments})


@needs_proc
def test_memory_is_linear():
    setup = "x, labels = torch.randn(n, 64).requires_grad_(), torch.arange(n) // 4"
    n = 8192
    growth = peak_growth(setup, "ce.fused_labelled_infonce_loss(x, labels).backward()", small=16, large=n)
    assert 0 < growth <= 64 * 2**20, f"{growth / 2**20:.0f} MiB; one matrix is {n * n * 4 / 2**20:.0f} MiB"


def _on_a_rank(rank: int) -> dict:
    """The mean over pairs of the whole batch, though the ranks have other numbers of them."""
    torch.manual_seed(0)
    z, t = torch.randn(12, 5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    z1, z2 = z, z + torch.randn_like(z)
    labels, own = LABELS[:12], slice(6 * rank, 6 * rank + 6)
    inputs = [x.clone().requires_grad_() for x in (z1, z2, t)]
    labelled = fused(inputs[0][own], labels[own], inputs[2], group=ce.AllRanks())
    sigmoid = ce.fused_sigmoid_loss(inputs[0][own], inputs[1][own], 1 / inputs[2], ids=labels[own], group=ce.AllRanks())
    found = [(x.detach(), *torch.autograd.grad(x, inputs, allow_unused=True)) for x in (labelled, sigmoid)]
    whole = [x.clone().requires_grad_() for x in (z1, z2, t)]
    wanted = (fused(whole[0], labels, whole[2]), ce.fused_sigmoid_loss(*whole[:2], 1 / whole[2], ids=labels))
    wanted = [(x.detach(), *torch.autograd.grad(x, whole, allow_unused=True)) for x in wanted]
    return {"found": found, "wanted": wanted}


def test_two_ranks_average_to_the_whole_batch(tmp_path):
    ranks = on_both_ranks(_on_a_rank, tmp_path)
    for found, wanted in zip(zip(*(rank["found"] for rank in ranks), strict=True), ranks[0]["wanted"], strict=True):
        for *parts, expected in zip(*found, wanted, strict=True):
            if expected is not None:
                torch.testing.assert_close(sum(parts) / WORLD, expected, rtol=1e-11, atol=1e-12)
