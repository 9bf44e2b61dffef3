"""lightly's losses: definitions (its own values: test_recorded_hosts.py), the memory bank, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_ext.adapters.lightly import DCLLoss, DCLWLoss, NTXentLoss
from parity import assert_compiles, assert_same, assert_survives_copies
from rows import INPUTS, random_pairs
from two_ranks import WORLD, on_both_ranks

KINDS = ["random", "peaked", "crowded"]


def _ntxent(a, b, t):
    z, index = F.normalize(torch.cat([a, b])), torch.arange(2 * len(a))
    own = torch.eye(len(index), dtype=torch.bool)
    return F.cross_entropy((z @ z.T / t).masked_fill(own, -torch.inf), index.roll(len(a)))


def _dcl(a, b, t, weight=None):
    """`_loss` of lightly 1.6, once for each order of the views."""
    a, b, own = F.normalize(a), F.normalize(b), torch.eye(len(a), dtype=torch.bool)

    def one(a, b):
        same, other = a @ a.T / t, a @ b.T / t
        positive = -other.diag() if weight is None else -other.diag() * weight(a, b)
        negatives = torch.cat([same.masked_fill(own, -torch.inf), other.masked_fill(own, -torch.inf)], 1)
        return (positive + negatives.logsumexp(1)).mean()

    return 0.5 * (one(a, b) + one(b, a))


def _von_mises(a, b):
    return 2 - len(a) * ((a.detach() * b.detach()).sum(1) / 0.5).softmax(0)


def _lopsided(a, b):
    """Not symmetric, and with a gradient."""
    return (a[:, 0] - 2 * b[:, 1]) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_ntxent(kind):
    assert_same(NTXentLoss(0.3), lambda a, b: _ntxent(a, b, 0.3), *INPUTS[kind](7, 5, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "module, weight",
    [(DCLLoss(0.2), None), (DCLWLoss(0.2), _von_mises), (DCLLoss(0.2, _lopsided), _lopsided)],
    ids=["plain", "dclw", "a gradient in weights"],
)
def test_decoupled(module, weight, kind):
    assert_same(module, lambda a, b: _dcl(a, b, 0.2, weight), *INPUTS[kind](7, 5, torch.float64))


def test_defaults_are_lightlys():
    pair = random_pairs(7, 5, torch.float64)
    assert_same(NTXentLoss(), lambda a, b: _ntxent(a, b, 0.5), *pair)
    assert_same(DCLLoss(), lambda a, b: _dcl(a, b, 0.1), *pair)
    assert_same(DCLWLoss(), lambda a, b: _dcl(a, b, 0.1, _von_mises), *pair)


def test_one_pair_alone_has_loss_zero():
    pair = random_pairs(1, 5, torch.float64)
    for module in (NTXentLoss(), DCLLoss(), DCLWLoss()):
        assert module(*pair) == 0


@pytest.mark.parametrize("size", [(9, 5), [9, 5], 9])
def test_memory_bank(size):
    """It begins with random unit rows, its keys give the positives' gradient, and every key enters it."""
    module, bank = NTXentLoss(0.2, size), None
    kept: list[torch.Tensor] = []
    for _ in range(4):  # 4 batches of 4 wrap around 9 rows
        a, b = (x.requires_grad_() for x in random_pairs(4, 5, torch.float64))
        if module.memory_bank is None:
            module(a.detach(), b)  # made at the first batch; without a gradient nothing enters
        bank = module.memory_bank.data.double().clone()
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(9).double(), rtol=0, atol=1e-6)
        na, nb = F.normalize(a), F.normalize(b)
        logits = torch.cat([(na * nb).sum(1, keepdim=True), na @ bank.T], 1) / 0.2
        expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        loss = module(a, b)
        kept = [*kept, *nb.detach()][-9:]
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)  # after the bank was overwritten
        torch.testing.assert_close(
            torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), rtol=1e-11, atol=1e-13
        )
    held = {tuple(row) for row in module.memory_bank.data.tolist()}
    assert held == {tuple(row) for row in torch.stack(kept).float().tolist()}
    assert "memory_bank_size=(9" in repr(module)


def test_memory_bank_is_saved():
    one, other = NTXentLoss(memory_bank_size=(9, 5)), NTXentLoss(memory_bank_size=(9, 5))
    one(*(x.requires_grad_() for x in random_pairs(4, 5)))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.memory_bank.data, other.memory_bank.data) and one.memory_bank.pointer == 4


def test_in_a_single_process_gathering_is_a_wish():
    pair = random_pairs(7, 5, torch.float64)
    for plain, gathered in (
        (NTXentLoss(), NTXentLoss(gather_distributed=True)),
        (DCLWLoss(), DCLWLoss(gather_distributed=True)),
    ):
        assert torch.equal(plain(*pair), gathered(*pair))


@pytest.mark.parametrize("module", [NTXentLoss(0.2), DCLLoss(0.2), DCLWLoss(0.2)], ids=repr)
def test_modules_are_values(module):
    pair = random_pairs(7, 5, torch.float64)
    assert_survives_copies(module, *pair)
    assert_compiles(module, *pair)
    assert "temperature=0.2" in repr(module)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: NTXentLoss(-0.1), "temperature must be > 0"),
        (lambda: DCLLoss(0.0), "temperature must be > 0"),
        (lambda: DCLWLoss(sigma=0.0), "sigma must be > 0"),
        (lambda: NTXentLoss(memory_bank_size=-1), r"memory_bank_size must be n >= 0 or \(n, D\); got -1"),
        (lambda: NTXentLoss(memory_bank_size=(4, 5, 6)), r"memory_bank_size must be n >= 0 or \(n, D\)"),
    ],
)
def test_refused_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def _gathered(rank: int) -> dict:
    torch.manual_seed(0)
    pair = random_pairs(4 * WORLD, 5, torch.float64)
    own, found = slice(4 * rank, 4 * rank + 4), {}
    for module in (NTXentLoss(0.3, gather_distributed=True), DCLLoss(0.3, gather_distributed=True)):
        a, b = (x[own].clone().requires_grad_() for x in pair)
        loss = module(a, b)
        found[type(module).__name__] = loss.detach(), *torch.autograd.grad(loss, (a, b))
    module = NTXentLoss(0.3, (9, 5), gather_distributed=True)
    module(*(x[own].clone().requires_grad_() for x in pair))
    return found | {"bank": module.memory_bank.data[:8].clone()}


def test_gathering_averages_to_the_whole_batch(tmp_path):
    ranks = on_both_ranks(_gathered, tmp_path)
    pair = [x.requires_grad_() for x in random_pairs(4 * WORLD, 5, torch.float64)]
    close = {"rtol": 1e-12, "atol": 1e-13}
    for name, whole in (("NTXentLoss", _ntxent(*pair, 0.3)), ("DCLLoss", _dcl(*pair, 0.3))):
        torch.testing.assert_close(sum(rank[name][0] for rank in ranks) / WORLD, whole.detach(), **close)
        for i, wanted in enumerate(torch.autograd.grad(whole, pair)):
            torch.testing.assert_close(torch.cat([rank[name][1 + i] for rank in ranks]) / WORLD, wanted, **close)
    for rank in ranks:  # the keys of both entered, in rank order
        torch.testing.assert_close(rank["bank"], F.normalize(pair[1].detach()).float())
