"""Gradient caching under DistributedDataParallel: two ranks, each in chunks, against one process.

Both ranks run everything in one go; tests look at the results.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from two_ranks import WORLD, assert_same, on_both_ranks

PAIRS, INPUTS, FEATURES, CHUNK = 14, 4, 5, 3  # 7 pairs a rank: chunks of 3, 3, 1
CASES = ["one encoder", "two encoders", "one encoder, accumulated", "two encoders, the second frozen"]


def _encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, FEATURES)).double()


def _wrapped(encoder: nn.Module) -> tuple[nn.Module, list[int]]:
    """The encoder as its ranks have it, and a list that grows with every exchange of gradients."""
    if not any(p.requires_grad for p in encoder.parameters()):
        return copy.deepcopy(encoder), []  # DistributedDataParallel refuses what has no gradient
    wrapped, exchanged = DistributedDataParallel(copy.deepcopy(encoder)), []

    def count(state, bucket):
        exchanged.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    return wrapped, exchanged


def _on_rank(rank: int) -> dict:
    return {case: _case(rank, case) for case in CASES}


def _case(rank: int, case: str) -> dict:
    torch.manual_seed(0)
    alone = [_encoder()] * 2 if case.startswith("one") else [_encoder(), _encoder()]
    alone[1].requires_grad_("frozen" not in case)
    scale = ce.LogitScale(0.3).double()
    wrapped = {id(encoder): _wrapped(encoder) for encoder in alone}
    parallel = [wrapped[id(encoder)][0] for encoder in alone]
    own_scale = copy.deepcopy(scale)
    loss = ce.DebiasedLoss(tau_plus=0.05)
    cache = ce.GradientCache(ce.DebiasedLoss(tau_plus=0.05, group=ce.AllRanks()), CHUNK)

    batches = torch.randn(2 if "accumulated" in case else 1, 2, PAIRS, INPUTS, dtype=torch.float64)
    for i, (x1, x2) in enumerate(batches):
        ids = torch.randint(0, 9, (PAIRS,))
        whole = loss(alone[0](x1), alone[1](x2), logit_scale=scale(), ids=ids)
        whole.backward()
        mine = torch.arange(PAIRS).chunk(WORLD)[rank]
        quiet = i + 1 < len(batches)
        with parallel[0].no_sync() if quiet else nullcontext():
            value = cache(tuple(parallel), x1[mine], x2[mine], logit_scale=own_scale(), ids=ids[mine])
            value.backward()

    averaged = value.detach().clone()
    # what no wrapper holds is averaged by the training script, once before the step
    for gradient in (averaged, own_scale.log_scale.grad):
        dist.all_reduce(gradient)
        gradient /= WORLD
    compared = [
        ("value", averaged, whole.detach()),
        ("temperature", own_scale.log_scale.grad, scale.log_scale.grad),
    ]
    for ours, theirs in zip(parallel, alone, strict=True):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        compared += [("gradient", a.grad, b.grad) for a, b in pairs if b.requires_grad]
    return {"compared": compared, "exchanges": [len(exchanged) for _, exchanged in wrapped.values()]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_both_ranks(_on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_in_chunks_give_the_gradient_of_the_whole_batch(ranks, case):
    for found in ranks:
        compared: list[tuple[str, Tensor, Tensor]] = found[case]["compared"]
        assert_same(compared)


@pytest.mark.parametrize("case", CASES)
def test_every_encoder_synchronises_once(ranks, case):
    # small encoders are one bucket; accumulated calls exchange in the last one alone; a frozen encoder never
    expected = {"one": [1], "two": [1, 0] if "frozen" in case else [1, 1]}[case.split()[0]]
    for found in ranks:
        assert found[case]["exchanges"] == expected
