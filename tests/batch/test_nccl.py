"""What a machine with two GPUs must show: every collective of ours over NCCL, values and gradients of the whole batch.

`make gpu` runs this where it finds two devices. Beside it such a machine must show that transfers run beside the
computation: in a trace (`torch.profiler`) of the ring's backward at 8,192 pairs per rank of 1,024 features, the
SendRecv kernels lie under those of the sweeps.
"""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from two_ranks import WORLD, assert_same, averaged, mine_of, on_both_ranks

PAIRS, FEATURES = 96, 40
EXCHANGES = {
    "gather": ce.AllRanks(),
    "ring": ce.AllRanks(exchange="ring"),
    "uneven gather": ce.AllRanks(uneven=True),
    "uneven ring": ce.AllRanks(exchange="ring", uneven=True),
}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")]


LOSSES = {
    "two views": lambda z1, z2, labels, t, group: ce.fused_debiased_loss(
        z1, z2, t, ids=labels, guide=ce.Guide.own(margin=-0.2), group=group
    ),
    "directions": lambda z1, z2, labels, t, group: ce.fused_infonce_loss(
        z1, z2, t, layout=("q2d", "q2q", "d2q", "d2d"), group=group
    ),
    "supcon": lambda z1, z2, labels, t, group: ce.fused_supcon_loss(torch.stack([z1, z2]), labels, t, group=group),
}


def _compared(rank: int, group: ce.AllRanks) -> list:
    torch.manual_seed(0)
    device = torch.device("cuda", rank)
    mine = mine_of(rank, PAIRS, PAIRS, uneven=group.uneven).to(device)
    z1, z2 = (torch.randn(PAIRS, FEATURES).double().to(device).requires_grad_() for _ in range(2))
    labels = (torch.arange(PAIRS) % 31).to(device)
    t = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for name, loss in LOSSES.items():
        results = []
        for own, ranks in ((mine, group), (torch.arange(PAIRS, device=device), None)):
            value = loss(z1[own], z2[own], labels[own], t, ranks)
            results.append([value.detach(), *torch.autograd.grad(value, [z1, z2, t])])
        found += [(name, a.cpu(), b.cpu()) for a, b in zip(averaged(results[0]), results[1], strict=True)]
    return found


def _half_precision_repeats(rank: int, group: ce.AllRanks) -> list:
    """16-bit operands on the wire, large enough for transfers to overlap: the same bits twice."""
    torch.manual_seed(rank)
    z1, z2 = (torch.randn(1024, 128, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    runs = []
    for _ in range(2):
        value = ce.fused_infonce_loss(z1, z2, 0.1, group=group)
        runs.append([value.detach(), *torch.autograd.grad(value, [z1, z2])])
    return [("bits", torch.tensor(float(torch.equal(a, b))), torch.tensor(1.0)) for a, b in zip(*runs, strict=True)]


def _run_everything(rank: int) -> dict:
    found: dict = {name: _compared(rank, group) for name, group in EXCHANGES.items()}
    queue = ce.NegativeQueue(8, 3, device="cuda")
    queue.enqueue(torch.full((2, 3), float(rank + 1), device="cuda"), group=ce.AllRanks())
    found["queue"] = [("signs", queue.data[:4, 0].sign().cpu(), torch.ones(4))]
    return found | {f"{name} twice": _half_precision_repeats(rank, EXCHANGES[name]) for name in ("gather", "ring")}


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_two_gpus_are_the_whole_batch(backend, tmp_path):
    """Ranks agree on the accelerator, and on the host."""
    for rank in on_both_ranks(_run_everything, tmp_path, backend=backend):
        for name, compared in rank.items():
            assert_same([(f"{name}: {label}", *values) for label, *values in compared])
