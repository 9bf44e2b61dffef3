"""`AllRanks(uneven=True)`: ranks with 8 and 4 pairs against one process with 12; then what such ranks refuse."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

import contrastive_ext as ce
from rows import LOSSES, RANKED, RANKED_USAGES, USAGES, random_pairs
from two_ranks import WORLD, assert_same, averaged, mine_of, on_both_ranks, shard

PAIRS, FEATURES = 12, 5  # pairs of all ranks together
BACKENDS = [name for name in ("torch", "cpu", "reference") if name in ce.available_backends()]
UNEVEN = ce.AllRanks(uneven=True)
CASES = [*itertools.product(LOSSES, USAGES, BACKENDS), *itertools.product(RANKED, RANKED_USAGES, BACKENDS)]
Z = torch.eye(6)[:, :3] + 0.1 * torch.arange(18.0).view(6, 3)

# name -> what rank r of two calls, what rank 0 says and what rank 1
MISTAKES = {
    "an empty rank": (
        lambda r: ce.fused_infonce_loss(Z[: 3 * (1 - r)], Z[: 3 * (1 - r)], group=UNEVEN),
        r"rank 1 of the group refused this call: .* got \[0, 3\]",
        r"ValueError: z1 and z2 must be \[B, D\] with B, D >= 1",
    ),
    "an even rank": (
        lambda r: ce.fused_infonce_loss(Z, Z, group=(UNEVEN, ce.AllRanks())[r]),
        *["uneven is True on rank 0, False on rank 1"] * 2,
    ),
    "width": (
        lambda r: ce.fused_infonce_loss(Z[: 5 + r, : 2 + r], Z[: 5 + r, : 2 + r], group=UNEVEN),
        *[r"z1 is torch.float32 \[\*, 2\] on cpu on rank 0, torch.float32 \[\*, 3\] on cpu on rank 1"] * 2,
    ),
    "views": (
        lambda r: ce.fused_supcon_loss(Z.expand(1 + r, -1, -1), torch.arange(6), group=UNEVEN),
        *[r"features is .* \[1, \*, 3\] .* \[2, \*, 3\]"] * 2,
    ),
    "queue": (
        lambda r: ce.fused_infonce_loss(Z, Z, queue=Z[: 5 + r], group=UNEVEN),
        *[r"queue is .* \[5, 3\] .* \[6, 3\]"] * 2,
    ),
    "ids": (
        lambda r: ce.fused_infonce_loss(Z, Z, ids=(None, torch.arange(6))[r], group=UNEVEN),
        *[r"ids is None on rank 0, torch.int64 \[\*\] on cpu on rank 1"] * 2,
    ),
}


def _case_name(loss, usage, backend) -> str:
    return f"{loss.name}-{usage.name}-{backend}"


def _compared(rank: int, function, leaves: dict[str, Tensor], local, mine: Tensor, **options) -> list:
    """Rows, sum and mean of this rank's call, and averaged gradients of the mean, against the whole batch.

    local   the rank's part of all keywords
    mine    its images
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    rows = function(**leaves, **options, reduction="none").detach()
    rows = rows.unflatten(0, (-1, PAIRS)) if rows.dim() == 1 else rows
    whole = function(**leaves, **options)
    expected = torch.autograd.grad(whole, list(leaves.values()))
    given = local(leaves | options)
    ours = function(**given, group=UNEVEN)
    gradients = averaged(torch.autograd.grad(ours, list(leaves.values())))
    none = function(**given, reduction="none", group=UNEVEN).detach()
    found = [
        ("mean", averaged([ours.detach()])[0], whole.detach()),
        ("rows", none.view(-1, len(mine)), rows[:, mine]),
        ("sum", function(**given, reduction="sum", group=UNEVEN).detach(), rows[:, mine].sum()),
    ]
    return found + list(zip([f"gradient of {name}" for name in leaves], gradients, expected, strict=True))


def _pairs(rank: int, loss, usage, backend: str) -> list:
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | loss.vectors(z1) | {"backend": backend}
    leaves = {"z1": z1, "z2": z2, "temperature": torch.tensor(0.4, dtype=torch.float64)}
    leaves |= {name: options.pop(name) for name in ("negatives", "positives") if name in options}
    mine = mine_of(rank, PAIRS, PAIRS, uneven=True)

    def local(arguments: dict) -> dict:
        columns = mine_of(rank, len(z2), PAIRS, uneven=True)
        ours = {"z1": arguments["z1"][mine], "z2": arguments["z2"][columns]}
        return shard(rank, arguments, PAIRS, uneven=True) | ours

    return _compared(rank, loss.function, leaves, local, mine, **options)


def _sets(rank: int) -> dict[str, list]:
    """Losses that take no pairs; SupCon's ranks differ in their share of rows with a positive too."""
    mine, found = mine_of(rank, PAIRS, PAIRS, uneven=True), {}
    labels = torch.tensor([0, 3, 0, 5, 6, 7, 8, 3, -2, -2, 9, 0])
    x, y, w = torch.randn(3, 2, PAIRS, FEATURES, dtype=torch.float64)
    temperature = {"temperature": torch.tensor(0.4, dtype=torch.float64)}
    perm = torch.cat([p := torch.randperm(8), torch.randperm(4) + len(p)])

    def local(*of_images: str):
        def sharded(arguments: dict) -> dict:
            parts = {name: arguments[name][..., mine, :] for name in of_images}
            parts |= {name: arguments[name][mine] for name in ("labels", "theta") if name in arguments}
            if "perm" in arguments:
                parts["perm"] = arguments["perm"][mine] - mine[0]
            return arguments | parts

        return sharded

    for backend in BACKENDS:
        for positives in ("out", "in"):
            options = {"labels": labels, "positives": positives, "backend": backend}
            found[f"supcon, {positives}, {backend}"] = _compared(
                rank, ce.fused_supcon_loss, {"features": x} | temperature, local("features"), mine, **options
            )
        for mode, top_k in (("attract", 3), ("eliminate", None)):
            options = {"labels": labels, "mode": mode, "top_k": top_k, "threshold": 0.3, "backend": backend}
            found[f"false negatives, {mode}, {backend}"] = _compared(
                rank, ce.fused_false_negative_loss, {"views": x} | temperature, local("views"), mine, **options
            )
        leaves = {"q": x[0], "q_mix": x[1]} | temperature
        options = {"k": y[0], "queue": w[0], "perm": perm, "theta": torch.rand(PAIRS, dtype=torch.float64)}
        found[f"self-labelling, {backend}"] = _compared(
            rank, ce.fused_self_labeling_loss, leaves, local("q", "k", "q_mix"), mine, **options, backend=backend
        )
        options = {"keys": y[1], "teacher": y[0], "teacher_temperature": 0.2, "backend": backend}
        found[f"soft targets, {backend}"] = _compared(
            rank, ce.fused_soft_target_loss, {"queries": x[0]} | temperature, local("queries", "keys", "teacher"), mine,
            **options,
        )  # fmt: skip
    return found


def _others(rank: int) -> list:
    mine = mine_of(rank, PAIRS, PAIRS, uneven=True)
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    loss = ce.Matryoshka(ce.Debiased(0.05), dims=(2, FEATURES))
    whole = ce.fused_row_loss(loss, z1, z2, layout="symmetric")
    ours = ce.fused_row_loss(loss, z1[mine], z2[mine], layout="symmetric", group=UNEVEN)
    even = ce.fused_row_loss(loss, z1[mine[:4]], z2[mine[:4]], group=UNEVEN)
    queue, expected = (ce.NegativeQueue(9, FEATURES, dtype=torch.float64) for _ in range(2))
    queue.enqueue(z1[mine], mine, group=UNEVEN)
    expected.enqueue(z1, torch.arange(PAIRS))
    return [
        ("prefixes", *averaged([ours]), whole),
        ("equal batches", even, ce.fused_row_loss(loss, z1[mine[:4]], z2[mine[:4]], group=ce.AllRanks())),
        *((name, value, expected.state_dict()[name]) for name, value in queue.state_dict().items()),
    ]


def _second_derivatives(rank: int) -> list:
    mine = mine_of(rank, PAIRS, PAIRS, uneven=True)
    z1, z2 = (z.requires_grad_() for z in random_pairs(PAIRS, FEATURES, torch.float64))
    whole = ce.fused_debiased_loss(z1, z2, backend="reference")
    penalty = sum(g.square().sum() for g in torch.autograd.grad(whole, [z1, z2], create_graph=True))
    expected = torch.autograd.grad(penalty, [z1, z2])
    own = [z[mine].detach().requires_grad_() for z in (z1, z2)]
    local = ce.fused_debiased_loss(*own, group=UNEVEN, backend="reference") / WORLD
    penalty = sum(g.square().sum() for g in torch.autograd.grad(local, own, create_graph=True))
    ours = torch.autograd.grad(penalty, own)
    return [(name, a, b[mine]) for name, a, b in zip(("z1", "z2"), ours, expected, strict=True)]


def _said(call, rank: int) -> str:
    try:
        call(rank)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _run_everything(rank: int) -> dict:
    results: dict = {}
    for case in CASES:
        torch.manual_seed(0)
        results[_case_name(*case)] = _pairs(rank, *case)
    torch.manual_seed(0)
    for name, function in (("sets", _sets), ("others", _others), ("second", _second_derivatives)):
        results[name] = function(rank)
    results["said"] = {name: _said(call, rank) for name, (call, *_) in MISTAKES.items()}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by name."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("loss, usage, backend", CASES, ids=itertools.starmap(_case_name, CASES))
def test_unequal_batches_are_the_whole_batch(ranks, loss, usage, backend):
    for rank in ranks:
        assert_same(rank[_case_name(loss, usage, backend)])


@pytest.mark.parametrize("name", ["others", "second"])
def test_unequal_batches_of(ranks, name):
    for rank in ranks:
        assert_same(rank[name])


def test_unequal_batches_of_losses_over_sets(ranks):
    for rank in ranks:
        for name, compared in rank["sets"].items():
            assert_same([(f"{name}: {label}", *values) for label, *values in compared])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_raise_on_every_rank(ranks, name):
    _, *says = MISTAKES[name]
    for rank, expected in zip(ranks, says, strict=True):
        assert re.search(expected, rank["said"][name])


def test_uneven_is_a_bool():
    with pytest.raises(TypeError, match="uneven must be True or False; got 1"):
        ce.AllRanks(uneven=1)
