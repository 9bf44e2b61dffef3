"""open_clip's ClipLoss: its definition (its own values: test_recorded_hosts.py), two ranks, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from contrastive_ext.adapters.open_clip import ClipLoss, SigLipLoss
from parity import assert_compiles, assert_same, assert_survives_copies
from rows import INPUTS, random_pairs
from two_ranks import WORLD, on_both_ranks


def _host(image, text, scale, bias=0.0):
    logits, index = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, index)) / 2


def _pair(kind: str = "random"):
    torch.manual_seed(0)  # the same at every call
    return tuple(F.normalize(x) for x in INPUTS[kind](7, 5, torch.float64))


SCALE = torch.tensor(14.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
def test_same_as_its_definition(kind):
    assert_same(ClipLoss(), _host, *_pair(kind), SCALE)


def test_a_bias_of_all_logits_changes_nothing():
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    loss = ClipLoss()(*_pair(), SCALE, logit_bias=bias)
    torch.testing.assert_close(loss, _host(*_pair(), SCALE, bias.detach()), rtol=1e-12, atol=1e-13)
    assert torch.autograd.grad(loss, bias)[0] == 0
    assert torch.equal(ClipLoss()(*_pair(), SCALE, -3.0), ClipLoss()(*_pair(), SCALE))


def test_output_dict():
    out = ClipLoss()(*_pair(), SCALE, output_dict=True)
    assert list(out) == ["contrastive_loss"] and torch.equal(out["contrastive_loss"], ClipLoss()(*_pair(), SCALE))


def test_module_is_a_value():
    module = ClipLoss(cache_labels=True)
    assert_survives_copies(module, *_pair(), SCALE)
    assert_compiles(module, *_pair(), SCALE)
    assert repr(module) == (
        "ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True, rank=0, world_size=1)"
    )


def _sigmoid_host(image, text, scale, bias):
    labels = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


BIAS = torch.tensor(-3.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
def test_sigmoid_loss_is_its_definition(kind):
    assert_same(SigLipLoss(), _sigmoid_host, *_pair(kind), SCALE, BIAS)
    assert_same(SigLipLoss(), lambda *x: _sigmoid_host(*x, 0.0), *_pair(kind), SCALE)
    out = SigLipLoss()(*_pair(kind), SCALE, BIAS, output_dict=True)
    assert list(out) == ["contrastive_loss"]


def test_sigmoid_module_is_a_value():
    module = SigLipLoss(cache_labels=True, dist_impl="shift")
    assert_survives_copies(module, *_pair(), SCALE, BIAS)
    assert_compiles(module, *_pair(), SCALE, BIAS)
    assert repr(module) == "SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl='shift')"
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        SigLipLoss(dist_impl="ring")


def _on_a_rank(rank: int) -> dict:
    torch.manual_seed(0)
    image, text = (F.normalize(x) for x in random_pairs(4 * WORLD, 5, torch.float64))
    own = slice(4 * rank, 4 * rank + 4)
    found = {}
    for local in (False, True):
        inputs = [x.clone().requires_grad_() for x in (image[own], text[own], SCALE)]
        module = ClipLoss(local_loss=local, gather_with_grad=True, rank=rank, world_size=WORLD)
        loss = module(*inputs)
        found[local] = loss.detach(), torch.autograd.grad(loss, inputs)
    inputs = [x.clone().requires_grad_() for x in (image[own], text[own], SCALE, BIAS)]
    loss = SigLipLoss(rank=rank, world_size=WORLD)(*inputs)
    found["sigmoid"] = loss.detach(), torch.autograd.grad(loss, inputs)
    with pytest.raises(ValueError, match=r"world_size=3, but torch\.distributed has 2 ranks"):
        ClipLoss(gather_with_grad=True, rank=rank, world_size=3)(image[own], text[own], SCALE)
    assert dist.get_world_size() == WORLD
    return found


def test_two_ranks_average_to_the_whole_batch(tmp_path):
    ranks = on_both_ranks(_on_a_rank, tmp_path)
    pair = (F.normalize(x) for x in random_pairs(4 * WORLD, 5, torch.float64))  # the ranks' seed is that of every test
    inputs = [x.clone().requires_grad_() for x in (*pair, SCALE)]
    whole = _host(*inputs)
    image, text, scale = torch.autograd.grad(whole, inputs)
    close = {"rtol": 1e-12, "atol": 1e-13}
    for local in (False, True):
        values = [rank[local][0] for rank in ranks]
        torch.testing.assert_close(sum(values) / WORLD, whole.detach(), **close)
        assert (values[0] == values[1]) == (not local)
        # what DistributedDataParallel averages: rank r's features reach the loss as 1/WORLD of their gradient here
        by_rank = [rank[local][1] for rank in ranks]
        torch.testing.assert_close(torch.cat([g[0] for g in by_rank]) / WORLD, image, **close)
        torch.testing.assert_close(torch.cat([g[1] for g in by_rank]) / WORLD, text, **close)
        torch.testing.assert_close(sum(g[2] for g in by_rank) / WORLD, scale, **close)


def test_sigmoid_losses_of_two_ranks_average_to_the_whole_batch(tmp_path):
    ranks = on_both_ranks(_on_a_rank, tmp_path)
    pair = (F.normalize(x) for x in random_pairs(4 * WORLD, 5, torch.float64))
    inputs = [x.clone().requires_grad_() for x in (*pair, SCALE, BIAS)]
    whole = _sigmoid_host(*inputs)
    image, text, *numbers = torch.autograd.grad(whole, inputs)
    values, by_rank = zip(*(rank["sigmoid"] for rank in ranks), strict=True)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(sum(values) / WORLD, whole.detach(), **close)
    for i, wanted in enumerate((image, text)):
        torch.testing.assert_close(torch.cat([g[i] for g in by_rank]) / WORLD, wanted, **close)
    for i, wanted in enumerate(numbers):
        torch.testing.assert_close(sum(g[2 + i] for g in by_rank) / WORLD, wanted, **close)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"use_horovod": True}, "use_horovod=True: .* start with torchrun"),
        ({"world_size": 2}, "gather_with_grad=False with world_size=2: .* give gather_with_grad=True"),
        ({"world_size": 2, "local_loss": True}, "gather_with_grad=False with world_size=2"),
    ],
)
def test_refused_options(options, says):
    with pytest.raises(ValueError, match=says):
        ClipLoss(**options)


def test_ranks_need_a_process_group():
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        ClipLoss(gather_with_grad=True, world_size=2)(*_pair(), SCALE)
