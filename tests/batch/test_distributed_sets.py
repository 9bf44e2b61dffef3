"""Losses that take no pairs: two ranks against one process that has the whole batch, as test_distributed.py does it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import contrastive_ext as ce
from two_ranks import WORLD, assert_same, on_both_ranks

IMAGES, FEATURES = 12, 5  # images of all ranks together
BACKENDS = [name for name in ("torch", "cpu", "reference") if name in ce.available_backends()]
EVERYONE = ce.AllRanks()
LABELS = torch.arange(IMAGES) % 5
CHECKS: dict[str, Callable] = {}  # name -> what each rank does: returns [(label, ours, expected), ...]


def check(function):
    """Run `function(rank)` on both ranks."""
    CHECKS[function.__name__] = function
    return function


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _mine(rank: int, length: int = IMAGES) -> Tensor:
    return torch.arange(length).chunk(WORLD)[rank]


def _averaged(gradients) -> list[Tensor]:
    """What DistributedDataParallel makes of the ranks' gradients."""
    totals = [gradient.clone() for gradient in gradients]
    for total in totals:
        dist.all_reduce(total)
    return [total / WORLD for total in totals]


def _queue() -> ce.NegativeQueue:
    """Not yet full, the same on all ranks."""
    queue = ce.NegativeQueue(9, FEATURES, dtype=torch.float64)
    queue.enqueue(_random(6, FEATURES), torch.arange(6) % 4)
    return queue


def _compare(rank: int, function, leaves: dict[str, Tensor], shared: Callable[[dict], dict], rows: int, **options):
    """Loss of every row, averaged gradients and statistics, of this rank and of the whole batch.

    leaves   what gets a gradient
    shared   this rank's part of the arguments of the call with the whole batch
    rows     number of axis 0 of the losses that belong to images, or of axis 1 for losses [V, B]
    """
    mine = _mine(rank, rows)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    whole, whole_stats = function(**leaves, **options, reduction="none", return_stats=True)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).mean(), list(leaves.values()))
    arguments = shared(leaves | options)
    losses, stats = function(**arguments, reduction="none", return_stats=True, group=EVERYONE)
    ours = torch.autograd.grad((losses * weight[..., mine]).mean(), list(leaves.values()))
    yield "loss of every row", losses.detach(), whole[..., mine].detach()
    yield from zip([f"gradient of {name}" for name in leaves], _averaged(ours), expected, strict=True)
    for reduction in ("mean", "sum"):
        value = function(**arguments, reduction=reduction, group=EVERYONE).detach()
        yield reduction, value, getattr(whole[..., mine].detach(), reduction)()
    # the others are no averages over rows
    names = [n for n, x in vars(whole_stats).items() if isinstance(x, Tensor) and n not in ("precision", "recall")]
    stats, whole_stats = (
        replace(s, empty_rows=s.empty_rows / n) if hasattr(s, "empty_rows") else s
        for s, n in ((stats, len(mine)), (whole_stats, rows))
    )
    found, of_all = (torch.stack([vars(s)[name].double() for name in names]) for s in (stats, whole_stats))
    yield "statistics", _averaged([found])[0], of_all


def _labelled(name: str, results) -> list[tuple[str, Tensor, Tensor]]:
    return [(f"{name}: {label}", ours, expected) for label, ours, expected in results]


@check
def soft_targets(rank: int):
    mine, keys_of_all = _mine(rank), _random(2 * 7, FEATURES)

    def shared(arguments: dict) -> dict:
        local = arguments | {name: arguments[name][mine] for name in ("queries", "teacher")}
        if isinstance(arguments["keys"], Tensor):
            local["keys"] = arguments["keys"][_mine(rank, len(keys_of_all))]
        return local

    for backend, keys, queue in itertools.product(BACKENDS, (keys_of_all, _queue()), (None, _queue())):
        leaves = {"queries": _random(IMAGES, FEATURES), "temperature": torch.tensor(0.3, dtype=torch.float64)}
        options = {
            "keys": keys, "teacher": _random(IMAGES, FEATURES), "queue": queue, "teacher_temperature": 0.2,
            "backend": backend,
        }  # fmt: skip
        name = f"{backend}, keys {type(keys).__name__}, queue {queue is not None}"
        yield from _labelled(name, _compare(rank, ce.fused_soft_target_loss, leaves, shared, IMAGES, **options))


@check
def self_labeling(rank: int):
    mine = _mine(rank)

    def shared(arguments: dict) -> dict:
        local = arguments | {name: arguments[name][mine] for name in ("q", "k", "q_mix", "theta") if name in arguments}
        if "perm" in arguments:
            local["perm"] = arguments["perm"][mine] - mine[0]
        return local

    for backend, queue, mixed in itertools.product(BACKENDS, (None, _queue()), (False, True)):
        leaves = {"q": _random(IMAGES, FEATURES), "temperature": torch.tensor(0.3, dtype=torch.float64)}
        options = {"k": _random(IMAGES, FEATURES), "queue": queue, "backend": backend}
        if mixed:
            leaves["q_mix"] = _random(IMAGES, FEATURES)
            within = [torch.randperm(IMAGES // WORLD) + _mine(r)[0] for r in range(WORLD)]
            options |= {"perm": torch.cat(within), "theta": torch.rand(IMAGES, dtype=torch.float64), "mu": 2.0}
        name = f"{backend}, queue {queue is not None}, mixed {mixed}"
        yield from _labelled(name, _compare(rank, ce.fused_self_labeling_loss, leaves, shared, IMAGES, **options))


@check
def one_image_per_rank(rank: int):
    """Enough for a comparison, which one process would refuse."""
    q, k = _random(2, WORLD, FEATURES)
    for backend in BACKENDS:
        whole = ce.fused_self_labeling_loss(q, k, None, reduction="none", backend=backend)
        own = slice(rank, rank + 1)
        ours = ce.fused_self_labeling_loss(q[own], k[own], None, reduction="none", backend=backend, group=EVERYONE)
        yield backend, ours, whole[own]


FALSE_NEGATIVES = {
    "attract": {},
    "eliminate": {"mode": "eliminate", "threshold": None, "top_k": 3},
    "threshold": {"threshold": 0.3, "top_k": None},
    "eliminate by threshold": {"mode": "eliminate", "threshold": 0.3, "top_k": None},
    "eliminate all": {"mode": "eliminate", "threshold": -2.0, "top_k": None},
    "short lists": {"threshold": 0.2, "top_k": 2, "aggregate": "mean"},
}


@check
def false_negatives(rank: int):
    mine = _mine(rank)

    def shared(arguments: dict) -> dict:
        local = dict(arguments)
        for name in ("views", "support", "keys"):
            if name in arguments:
                local[name] = arguments[name][:, mine]
        return local | {"labels": arguments["labels"][mine]} if "labels" in arguments else local

    for backend, name, v in itertools.product(BACKENDS, FALSE_NEGATIVES, (2, 3)):
        leaves = {"views": _random(v, IMAGES, FEATURES), "temperature": torch.tensor(0.3, dtype=torch.float64)}
        options = FALSE_NEGATIVES[name] | {"backend": backend}
        more = {
            "alone": {},
            "support, queue, labels": {"support": _random(1, IMAGES, FEATURES), "queue": _queue(), "labels": LABELS},
            "keys": {"keys": _random(v, IMAGES, FEATURES)},
        }
        for what, given in more.items():
            compared = _compare(rank, ce.fused_false_negative_loss, leaves, shared, IMAGES, **options, **given)
            yield from _labelled(f"{backend}, {name}, {v} views, {what}", compared)


@check
def precision_and_recall(rank: int):
    mine, labels = _mine(rank), LABELS
    for backend, name in itertools.product(BACKENDS, FALSE_NEGATIVES):
        views, queue = _random(2, IMAGES, FEATURES), _queue()
        options = FALSE_NEGATIVES[name] | {"backend": backend, "queue": queue, "return_stats": True}
        _, whole = ce.fused_false_negative_loss(views, labels=labels, **options)
        _, stats = ce.fused_false_negative_loss(views[:, mine], labels=labels[mine], group=EVERYONE, **options)
        right = whole.precision * whole.detected
        found, detected = stats.precision * stats.detected, stats.detected
        yield name, *_averaged([torch.stack([found, detected])]), torch.stack([right, whole.detected])
        columns = torch.cat([labels, labels, queue.ids])
        there = (columns == labels[mine, None]).sum() - 2 * len(mine)
        yield f"{name}: recall", stats.recall, found * len(mine) / there


def _run_everything(rank: int) -> dict:
    results = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        results[name] = list(function(rank))
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by name."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_together_are_the_whole_batch(ranks, name):
    for rank in ranks:
        assert_same(rank[name])
