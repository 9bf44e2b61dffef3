"""Two ranks that gather negatives against one process that has the whole batch: the same loss, and after the average
that DistributedDataParallel takes the same gradient. Both ranks run everything in one go; tests look at the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from rows import LOSSES, RANKED, RANKED_USAGES, USAGES, Loss, random_pairs
from two_ranks import WORLD, assert_same, averaged, mine_of, on_both_ranks, shard

PAIRS, FEATURES = 12, 5  # pairs of all ranks together
BACKENDS = [name for name in ("torch", "cpu", "reference") if name in ce.available_backends()]
CASES = [*itertools.product(LOSSES, USAGES, BACKENDS), *itertools.product(RANKED, RANKED_USAGES, BACKENDS)]
CHECKS: dict[str, Callable] = {}  # name -> what each rank does: returns [(label, ours, expected), ...]


def check(function):
    """Run `function(rank)` on both ranks."""
    CHECKS[function.__name__] = function
    return function


def _case_name(loss, usage, backend) -> str:
    return f"{loss.name}-{usage.name}-{backend}"


def _against_whole_batch(
    rank: int, loss: Loss, options: dict, z1: Tensor, z2: Tensor, temperature: float = 0.4
) -> list[tuple[str, Tensor, Tensor]]:
    """Loss of every anchor and averaged gradients of every input, of this rank and of the whole batch."""
    inputs = {"z1": z1, "z2": z2, "temperature": torch.tensor(temperature, dtype=z1.dtype)}
    inputs |= {name: options[name] for name in ("negatives", "positives") if name in options}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}

    whole = loss.function(**(options | leaves), reduction="none").unflatten(0, (-1, PAIRS))
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).mean(), list(leaves.values()))

    pairs = mine_of(rank, PAIRS, PAIRS)
    local = shard(rank, options | leaves, PAIRS) | {
        "z1": leaves["z1"][pairs],
        "z2": leaves["z2"][mine_of(rank, len(z2), PAIRS)],
    }
    losses = loss.function(**local, reduction="none", group=dist.group.WORLD).unflatten(0, (-1, len(pairs)))
    ours = torch.autograd.grad((losses * weight[:, pairs]).mean(), list(leaves.values()))

    compared = [("loss of every anchor", losses.detach(), whole.detach()[:, pairs])]
    return compared + list(zip([f"gradient of {n}" for n in leaves], averaged(ours), expected, strict=True))


def _whole_batch_of(loss: Loss, usage, backend: str) -> tuple[dict, Tensor, Tensor]:
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    z2, options = usage.options(z1, z2)
    return options | loss.parameters | loss.vectors(z1) | {"backend": backend}, z1, z2


@check
def data_parallel_training(rank: int):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(7, FEATURES, dtype=torch.float64)
            self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x1, x2):
            return self.linear(x1), self.linear(x2), self.log_scale.exp()

    for layout in ("two_view", "one_way", "symmetric"):
        alone = Encoder()
        parallel = DistributedDataParallel(Encoder())
        parallel.module.load_state_dict(alone.state_dict())
        x1, x2 = torch.randn(2, PAIRS, 7, dtype=torch.float64)
        mine = mine_of(rank, PAIRS, PAIRS)
        z1, z2, scale = alone(x1, x2)
        whole = ce.HardNegativeLoss(tau_plus=0.05)(z1, z2, logit_scale=scale, layout=layout)
        z1, z2, scale = parallel(x1[mine], x2[mine])
        local = ce.HardNegativeLoss(tau_plus=0.05, group=dist.group.WORLD)(z1, z2, logit_scale=scale, layout=layout)
        whole.backward()
        local.backward()
        yield f"{layout}: mean loss", averaged([local.detach()])[0], whole.detach()
        for name, parameter in alone.named_parameters():
            yield f"{layout}: gradient of {name}", parallel.module.get_parameter(name).grad, parameter.grad


@check
def reductions(rank: int):
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    mine = mine_of(rank, PAIRS, PAIRS)
    rows = ce.fused_debiased_loss(z1, z2, reduction="none").view(2, PAIRS)[:, mine]
    for reduction in ("mean", "sum"):
        ours = ce.fused_debiased_loss(z1[mine], z2[mine], reduction=reduction, group=dist.group.WORLD)
        yield reduction, ours, getattr(rows, reduction)()


@check
def statistics_average_to_those_of_the_whole_batch(rank: int):
    # a guide may leave one rank more empty rows than the other, which averages do not count
    usages = [usage for usage in RANKED_USAGES if "guide" not in usage.name]
    for backend, usage, loss in itertools.product(BACKENDS, usages, (LOSSES[0], RANKED[0])):
        options, z1, z2 = _whole_batch_of(loss, usage, backend)
        options |= {"return_stats": True}
        _, whole = loss.function(z1, z2, **options)
        local = z1[mine_of(rank, PAIRS, PAIRS)], z2[mine_of(rank, len(z2), PAIRS)]
        _, stats = loss.function(*local, **shard(rank, options, PAIRS), group=dist.group.WORLD)
        assert stats.empty_rows == whole.empty_rows == 0
        fields = {name: x for name, x in vars(whole).items() if isinstance(x, Tensor)}
        ours = torch.stack([vars(stats)[name].double() for name in fields])
        yield _case_name(loss, usage, backend), *averaged([ours]), torch.stack([x.double() for x in fields.values()])


@check
def one_pair_per_rank(rank: int):
    z1, z2 = random_pairs(WORLD, FEATURES, torch.float64)
    for backend, layout in itertools.product(BACKENDS, ("two_view", "one_way", "symmetric")):
        whole = ce.fused_infonce_loss(z1, z2, layout=layout, backend=backend, reduction="none").view(-1, WORLD)
        own = slice(rank, rank + 1)
        options = {"layout": layout, "backend": backend, "reduction": "none"}
        ours = ce.fused_infonce_loss(z1[own], z2[own], group=dist.group.WORLD, **options)
        yield f"{layout} {backend}", ours, whole[:, rank]


@check
def keys_without_gradient(rank: int):
    for backend in BACKENDS:
        z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
        mine = mine_of(rank, PAIRS, PAIRS)
        z1.requires_grad_()
        options = {"layout": "one_way", "backend": backend}
        whole = ce.fused_infonce_loss(z1, z2, **options)
        local = ce.fused_infonce_loss(z1[mine], z2[mine], group=dist.group.WORLD, **options)
        (expected,), (ours,) = (torch.autograd.grad(x, [z1]) for x in (whole, local))
        yield backend, *averaged([ours]), expected


@check
def second_derivatives_of_the_reference(rank: int):
    for layout in ("two_view", "one_way", "symmetric"):
        z1, z2 = (z.requires_grad_() for z in random_pairs(PAIRS, FEATURES, torch.float64))
        mine, options = mine_of(rank, PAIRS, PAIRS), {"layout": layout, "backend": "reference"}
        whole = ce.fused_debiased_loss(z1, z2, **options)
        penalty = sum(g.square().sum() for g in torch.autograd.grad(whole, [z1, z2], create_graph=True))
        expected = torch.autograd.grad(penalty, [z1, z2])

        own = [z[mine].detach().requires_grad_() for z in (z1, z2)]
        local = ce.fused_debiased_loss(*own, group=dist.group.WORLD, **options) / WORLD
        penalty = sum(g.square().sum() for g in torch.autograd.grad(local, own, create_graph=True))
        for name, ours, second in zip(("z1", "z2"), torch.autograd.grad(penalty, own), expected, strict=True):
            yield f"{layout}: second derivative by {name}", ours, second[mine]


@check
def supervised(rank: int):
    """The ranks share classes, but not equally many rows with a positive."""
    labels = torch.tensor([0, 3, 0, 5, 6, 7, 8, 3, -2, -2, 9, 0])
    for backend, positives, views in itertools.product(BACKENDS, ("out", "in"), (1, 2)):
        x = torch.randn(views, PAIRS, FEATURES, dtype=torch.float64, requires_grad=True)
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        results = []
        for own in (slice(None), mine_of(rank, PAIRS, PAIRS)):
            group = None if isinstance(own, slice) else dist.group.WORLD
            options = {"positives": positives, "backend": backend, "group": group}
            value = ce.fused_supcon_loss(x[:, own], labels[own], t, **options)
            results.append([value.detach(), *torch.autograd.grad(value, [x, t])])
        whole, ours = results[0], averaged(results[1])
        for name, *compared in zip(("loss", "gradient", "gradient of temperature"), ours, whole, strict=True):
            yield f"{backend} {positives}, {views} views: {name}", *compared


@check
def queues_stay_the_same_everywhere(rank: int):
    whole, local = (ce.NegativeQueue(17, FEATURES, dtype=torch.float64) for _ in range(2))
    mine = mine_of(rank, PAIRS, PAIRS)
    for step in range(3):  # the second wraps around
        keys, ids = torch.randn(PAIRS, FEATURES, dtype=torch.float64), torch.arange(PAIRS) % 5 + step
        whole.enqueue(keys, ids)
        local.enqueue(keys[mine], ids[mine], group=dist.group.WORLD)
        for name, value in whole.state_dict().items():
            yield f"{name} after step {step}", local.state_dict()[name], value


@check
def a_group_of_one_is_no_group(rank: int):
    alone = [dist.new_group([r]) for r in range(WORLD)]
    z1, z2 = random_pairs(4 + rank, FEATURES, torch.float64)
    for layout in ("two_view", "one_way", "symmetric"):
        expected = ce.fused_infonce_loss(z1, z2, layout=layout)
        yield layout, ce.fused_infonce_loss(z1, z2, layout=layout, group=alone[rank]), expected


def _by_dtype(rank: int) -> dict:
    """By dtype: averaged loss and gradients of z1 and z2, and those of the whole batch."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z1, z2 = random_pairs(PAIRS, FEATURES, dtype)
        mine, results = mine_of(rank, PAIRS, PAIRS), []
        for local in (True, False):
            leaves = [z.clone().requires_grad_() for z in (z1, z2)]
            own = [z[mine] for z in leaves] if local else leaves
            value = ce.fused_infonce_loss(*own, 0.1, group=dist.group.WORLD if local else None)
            grads = torch.autograd.grad(value, leaves)
            results.append([*averaged([value.detach(), *grads])] if local else [value.detach(), *grads])
        found[str(dtype)] = results
    return found


def _run_everything(rank: int) -> dict:
    results: dict = {}
    for loss, usage, backend in CASES:
        torch.manual_seed(0)
        options, z1, z2 = _whole_batch_of(loss, usage, backend)
        results[_case_name(loss, usage, backend)] = _against_whole_batch(rank, loss, options, z1, z2)
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        results[name] = list(function(rank))
    torch.manual_seed(0)
    return results | {"by_dtype": _by_dtype(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by name."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("loss, usage, backend", CASES, ids=itertools.starmap(_case_name, CASES))
def test_ranks_together_are_the_whole_batch(ranks, loss, usage, backend):
    for rank in ranks:
        assert_same(rank[_case_name(loss, usage, backend)])


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(ranks, name):
    for rank in ranks:
        assert_same(rank[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_operands_of_every_dtype_are_sent_exactly(ranks, dtype):
    """Nothing is lost on the wire: what differs is the order of float32 sums, and the gradient's last rounding."""
    for rank in ranks:
        ours, whole = rank["by_dtype"][str(dtype)]
        for a, b, precision in zip(ours, whole, (torch.float32, dtype, dtype), strict=True):
            assert a.dtype == b.dtype == precision
            atol = (torch.finfo(precision).eps + 64 * torch.finfo(torch.float32).eps) * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=atol)
