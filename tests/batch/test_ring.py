"""`AllRanks(exchange="ring")`: 2, 3 and 4 ranks, one foreign shard at a time, against one process with the whole batch.

Two and four ranks have as many pairs each, three have 6, 4 and 2. What a call can say beyond pairs, tuples of
directions for instance, is in test_three_ranks.py; memory is in test_ring_memory.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from contrastive_ext.batch import ring
from rows import LOSSES, RANKED, RANKED_USAGES, USAGES, random_pairs
from two_ranks import assert_same, averaged, mine_of, on_both_ranks, shard

PAIRS, FEATURES = 12, 5  # pairs of all ranks together
UNEVEN = {2: False, 3: True, 4: False}  # by the number of ranks
WORLD = max(UNEVEN)
GROUPS: dict[int, dist.ProcessGroup] = {}  # the last so many ranks, and every rank alone
RING = ce.AllRanks(exchange="ring")
HISTOGRAMS = [loss for loss in RANKED if loss.parameters.get("ranks") == "histogram"]
BACKENDS = [name for name in ("torch", "cpu") if name in ce.available_backends()]
USED = {
    2: USAGES,
    3: USAGES,
    4: [usage for usage in USAGES if usage.name in ("two_view", "one_way_more_columns", "guide_queue", "ids_queue")],
}
CASES = {
    world: [
        (loss, usage, BACKENDS[(i + j + world) % len(BACKENDS)])
        for (i, loss), (j, usage) in itertools.product(enumerate([*LOSSES, *HISTOGRAMS]), enumerate(USED[world]))
        if loss not in HISTOGRAMS or usage in RANKED_USAGES
    ]
    for world in UNEVEN
}
CHECKS: dict[str, Callable] = {}  # name -> what each rank does: returns [(label, ours, expected), ...]
LABELS = torch.tensor([0, 3, 0, 5, 6, 7, 8, 3, -2, -2, 9, 0])
Z = torch.eye(6)[:, :3] + 0.1 * torch.arange(18.0).view(6, 3)
VIEWS = torch.stack([Z, Z])

# name -> what rank r of two calls, and what both say
MISTAKES: dict[str, tuple[Callable[[int], object], str]] = {
    "a rank that gathers": (
        lambda r: ce.fused_infonce_loss(Z, Z, group=(RING, ce.AllRanks())[r]),
        "exchange is ring on ranks 0, 2, gather on ranks 1, 3",
    ),
    "dtypes": (
        lambda r: ce.fused_infonce_loss(*[Z.to((torch.half, torch.double)[r])] * 2, group=RING),
        "z1 is torch.float16 .* torch.float64",
    ),
    "a frozen side": (
        lambda r: ce.fused_infonce_loss(Z, Z.clone().requires_grad_(r == 1), layout="one_way", group=RING),
        "z2 is .* on ranks 0, 2, .* with gradient on ranks 1, 3",
    ),
    "the reference": (
        lambda r: ce.fused_infonce_loss(Z, Z, backend="reference", group=RING),
        r"backend='reference' forms the matrix of all columns\. Use AllRanks\(exchange='gather'\)",
    ),
    "the reference on one rank": (
        lambda r: ce.fused_infonce_loss(Z, Z, backend=("auto", "reference")[r], group=RING),
        "exchange='ring' is not possible here: backend='reference'",
    ),
    "ranks": (lambda r: ce.fused_bayesian_loss(Z, Z, group=RING), "exact ranks are among the columns of all ranks"),
    "ranks of prefixes": (
        lambda r: ce.fused_row_loss(ce.Matryoshka(ce.Bayesian(), (2, 3)), Z, Z, group=RING),
        "exact ranks are among the columns of all ranks",
    ),
    "soft targets": (
        lambda r: ce.fused_soft_target_loss(Z, Z, Z, teacher_temperature=0.1, group=RING),
        "its keys are constants",
    ),
    "self-labelling": (lambda r: ce.fused_self_labeling_loss(Z, Z, None, group=RING), "its keys are constants"),
    "false negatives": (
        lambda r: ce.fused_false_negative_loss(VIEWS, group=RING),
        "false negatives are detected among the columns of all ranks",
    ),
    "sigmoid's reference": (
        lambda r: ce.fused_sigmoid_loss(Z, Z, backend="reference", group=RING),
        "backend='reference' forms the matrix",
    ),
    "supcon's reference": (
        lambda r: ce.fused_supcon_loss(Z, torch.arange(6), backend="reference", group=RING),
        "backend='reference' forms the matrix",
    ),
}


def check(function):
    """Run `function(rank, world)` on all ranks."""
    CHECKS[function.__name__] = function
    return function


def _case_name(loss, usage, backend) -> str:
    return f"{loss.name}-{usage.name}-{backend}"


def _group(world: int) -> ce.AllRanks:
    return ce.AllRanks(GROUPS[world], exchange="ring", uneven=UNEVEN[world])


def _averaged(gradients, world: int) -> list[Tensor]:
    return averaged(gradients, GROUPS[world])


def _mine(rank: int, world: int, length: int = PAIRS) -> Tensor:
    return mine_of(rank, length, PAIRS, UNEVEN[world], world)


def _against_whole_batch(rank: int, world: int, loss, usage, backend: str) -> list[tuple[str, Tensor, Tensor]]:
    """Loss of every anchor, gradients under a random upstream, mean and statistics."""
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | loss.vectors(z1) | {"backend": backend}
    leaves = {"z1": z1, "z2": z2, "temperature": torch.tensor(0.4, dtype=torch.float64)}
    leaves |= {name: options.pop(name) for name in ("negatives", "positives") if name in options}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}

    whole = loss.function(**leaves, **options, reduction="none").unflatten(0, (-1, PAIRS))
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), list(leaves.values()))
    whole = whole.detach()

    mine = _mine(rank, world)
    local = shard(rank, options | leaves, PAIRS, UNEVEN[world], world)
    local |= {"z1": leaves["z1"][mine], "z2": leaves["z2"][_mine(rank, world, len(z2))], "group": _group(world)}
    rows, stats = loss.function(**local, reduction="none", return_stats=True)
    rows = rows.unflatten(0, (-1, len(mine)))
    ours = torch.autograd.grad((rows * weight[:, mine]).sum(), list(leaves.values()))
    mean = loss.function(**local).detach()
    compared = [("rows", rows.detach(), whole[:, mine]), ("mean", *_averaged([mean], world), whole.mean())]
    summed = [world * gradient for gradient in _averaged(ours, world)]
    compared += zip([f"gradient of {name}" for name in leaves], summed, expected, strict=True)
    if "guide" in usage.name or UNEVEN[world]:  # averages leave out empty rows, and are of as many rows on each rank
        return compared
    _, of_whole = loss.function(**leaves, **options, return_stats=True)
    names = [name for name, x in vars(of_whole).items() if isinstance(x, Tensor)]
    found, all_rows = (torch.stack([vars(s)[name].double() for name in names]) for s in (stats, of_whole))
    return [*compared, ("statistics", *_averaged([found.detach()], world), all_rows.detach())]


@check
def supervised(rank: int, world: int):
    """The ranks share classes, but not equally many rows with a positive."""
    mine = _mine(rank, world)
    held = ce.Columns(torch.randn(5, FEATURES, dtype=torch.float64), ids=torch.tensor([0, 3, -2, 9, 77]))
    for backend, positives, views in itertools.product(BACKENDS, ("out", "in"), (1, 2)):
        x = torch.randn(views, PAIRS, FEATURES, dtype=torch.float64, requires_grad=True)
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        options = {"positives": positives, "backend": backend, "queue": held if views == 2 else None}
        whole = ce.fused_supcon_loss(x, LABELS, t, **options)
        ours = ce.fused_supcon_loss(x[:, mine], LABELS[mine], t, **options, group=_group(world))
        expected = [whole.detach(), *torch.autograd.grad(whole, [x, t])]
        found = _averaged([ours.detach(), *torch.autograd.grad(ours, [x, t])], world)
        for name, *compared in zip(("loss", "gradient", "gradient of temperature"), found, expected, strict=True):
            yield f"{backend} {positives}, {views} views: {name}", *compared


def _sums(rank: int, world: int, function, leaves: dict, local: Callable[[], dict]):
    """Loss of every row, gradients under a random upstream, mean; `local` makes this rank's arguments of leaves."""
    for backend in BACKENDS:
        how = {"backend": backend}
        whole = function(**leaves, **how, reduction="none")
        weight, mine = torch.randn_like(whole), _mine(rank, world)
        expected = torch.autograd.grad((whole * weight).sum(), list(leaves.values()))
        ours = function(**local(), **how, reduction="none", group=_group(world))
        found = torch.autograd.grad((ours * weight[..., mine]).sum(), list(leaves.values()))
        yield f"{backend}: rows", ours.detach(), whole[..., mine].detach()
        summed = [world * gradient for gradient in _averaged(found, world)]
        yield from zip([f"{backend}: gradient of {name}" for name in leaves], summed, expected, strict=True)
        mean = function(**local(), **how, group=_group(world)).detach()
        yield f"{backend}: mean", *_averaged([mean], world), function(**leaves, **how).detach()


@check
def sigmoid(rank: int, world: int):
    """Pairs of equal id on several ranks are positives of one another; further rows of z2 are negatives of all."""
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    z2 = torch.cat([z2, torch.randn(4, FEATURES, dtype=torch.float64)])
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (5.0, -2.0))
    leaves = {"z1": z1, "z2": z2, "logit_scale": scale, "logit_bias": bias}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    mine, of_columns = _mine(rank, world), _mine(rank, world, len(z2))

    def local() -> dict:
        return leaves | {"z1": z1[mine], "z2": z2[of_columns]}

    yield from _sums(rank, world, ce.fused_sigmoid_loss, leaves, local)
    ids = torch.cat([LABELS, torch.tensor([0, 3, 4, 6])])

    def with_ids(group=None, **options):
        return ce.fused_sigmoid_loss(ids=ids if group is None else ids[of_columns], group=group, **options)

    for name, a, b in _sums(rank, world, with_ids, leaves, local):
        yield f"ids, {name}", a, b


@check
def labelled_infonce(rank: int, world: int):
    mine = _mine(rank, world)
    held = ce.Columns(torch.randn(5, FEATURES, dtype=torch.float64), ids=torch.tensor([0, 3, -2, 9, 77]))
    for queue in (None, held):
        x = torch.randn(2, PAIRS, FEATURES, dtype=torch.float64)
        leaves = {"features": x, "temperature": torch.tensor(0.3, dtype=torch.float64)}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}

        def local(leaves=leaves) -> dict:
            return leaves | {"features": leaves["features"][:, mine]}

        def function(group=None, queue=queue, **options):
            labels = LABELS if group is None else LABELS[mine]
            return ce.fused_labelled_infonce_loss(labels=labels, queue=queue, group=group, **options)

        for name, a, b in _sums(rank, world, function, leaves, local):
            yield f"{'queue' if queue else 'batch'}, {name}", a, b


@check
def sums_with_one_side_without_gradient(rank: int, world: int):
    for frozen in ("z1", "z2"):
        z = dict(zip(("z1", "z2"), random_pairs(PAIRS, FEATURES, torch.float64), strict=True))
        learned = z["z1" if frozen == "z2" else "z2"].requires_grad_()
        local = {name: x[_mine(rank, world)] for name, x in z.items()}
        losses = [ce.fused_sigmoid_loss(**z), ce.fused_sigmoid_loss(**local, group=_group(world))]
        (expected,), (found,) = (torch.autograd.grad(x, [learned]) for x in losses)
        yield f"{frozen} frozen", *_averaged([found], world), expected


@check
def sums_whose_ranks_ask_for_other_gradients(rank: int, world: int):
    """What travels is what the forwards knew to need a gradient; one way to the same bits."""
    z1, z2 = (z[_mine(rank, world)].requires_grad_() for z in random_pairs(PAIRS, FEATURES, torch.float64))
    values = [ce.fused_sigmoid_loss(z1, z2, group=_group(world)) for _ in "ab"]
    both, one = (torch.autograd.grad(x, w) for x, w in zip(values, ([z1, z2], [z1, z2] if rank else [z1]), strict=True))
    same = [torch.equal(*values), *map(torch.equal, both, one)]
    yield "bits", torch.tensor(same).double(), torch.ones(len(same), dtype=torch.float64)


@check
def weighted_negatives(rank: int, world: int):
    """Weights travel with the columns they belong to."""
    z1, z2 = random_pairs(PAIRS, FEATURES, torch.float64)
    negatives, weights = torch.randn(PAIRS, FEATURES, dtype=torch.float64), torch.randn(PAIRS)
    t = torch.tensor(0.3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (z1, z2, negatives, t)]
    for backend in BACKENDS:
        how = {"layout": "one_way", "backend": backend}
        whole = ce.fused_hard_negative_loss(z1, z2, t, 0.05, negatives=ce.Columns(negatives, log_weight=weights), **how)
        mine = _mine(rank, world)
        columns = ce.Columns(negatives[mine], log_weight=weights[mine])
        ours = ce.fused_hard_negative_loss(z1[mine], z2[mine], t, 0.05, negatives=columns, **how, group=_group(world))
        expected = [whole.detach(), *torch.autograd.grad(whole, leaves)]
        found = _averaged([ours.detach(), *torch.autograd.grad(ours, leaves)], world)
        for name, *compared in zip(("loss", "z1", "z2", "negatives", "temperature"), found, expected, strict=True):
            yield f"{backend}: {name}", *compared


@check
def one_side_without_gradient(rank: int, world: int):
    for backend, frozen in itertools.product(BACKENDS, ("z1", "z2")):
        z = dict(zip(("z1", "z2"), random_pairs(PAIRS, FEATURES, torch.float64), strict=True))
        learned = z["z1" if frozen == "z2" else "z2"].requires_grad_()
        local = {name: x[_mine(rank, world)] for name, x in z.items()}
        whole = ce.fused_infonce_loss(**z, layout="one_way", backend=backend)
        ours = ce.fused_infonce_loss(**local, layout="one_way", backend=backend, group=_group(world))
        (expected,), (found,) = (torch.autograd.grad(x, [learned]) for x in (whole, ours))
        yield f"{backend}, {frozen} frozen", *_averaged([found], world), expected


@check
def the_same_bits_every_time(rank: int, world: int):
    """Also where one rank asks for one gradient alone; transfers beside the computation change the order of sums."""
    z1, z2 = (z[_mine(rank, world)].requires_grad_() for z in random_pairs(PAIRS, FEATURES, torch.float64))
    for layout in ("two_view", ("q2d", "d2q")):
        found = []
        for overlaps, wanted in itertools.product((False, True), ([z1, z2], [z1, z2] if rank else [z1])):
            ring.OVERLAPS["cpu"] = overlaps
            value = ce.fused_infonce_loss(z1, z2, 0.1, layout=layout, ids=_mine(rank, world) % 5, group=_group(world))
            found.append([value.detach(), *torch.autograd.grad(value, wanted)])
        ring.OVERLAPS["cpu"] = False
        between, again, beside, beside_again = found
        for first, second in ((between, again), (beside, beside_again)):
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=False)]
            yield f"{layout}, bits", torch.tensor(same).double(), torch.ones(len(same), dtype=torch.float64)
        for first, second in zip(between, beside, strict=True):
            yield f"{layout}, values", second, first


@check
def data_parallel_training_with_a_cache(rank: int, world: int):
    alone, scale = nn.Linear(7, FEATURES, dtype=torch.float64), ce.LogitScale(0.3).double()
    own = DistributedDataParallel(nn.Linear(7, FEATURES, dtype=torch.float64), process_group=GROUPS[world])
    own.module.load_state_dict(alone.state_dict())
    x1, x2 = torch.randn(2, PAIRS, 7, dtype=torch.float64)
    mine = _mine(rank, world)
    whole = ce.fused_hard_negative_loss(alone(x1), alone(x2), logit_scale=scale(), tau_plus=0.05)
    whole.backward()
    expected = scale.log_scale.grad.clone()
    scale.zero_grad()
    cache = ce.GradientCache(ce.fused_hard_negative_loss, 2)
    local = cache(own, x1[mine], x2[mine], logit_scale=scale(), tau_plus=0.05, group=_group(world))
    local.backward()
    yield "mean", *_averaged([local.detach()], world), whole.detach()
    yield "scale", *_averaged([scale.log_scale.grad], world), expected
    for name, parameter in alone.named_parameters():
        yield name, own.module.get_parameter(name).grad, parameter.grad


@check
def a_group_of_one_is_no_group(rank: int, world: int):
    alone = ce.AllRanks(GROUPS[1], exchange="ring")
    z1, z2 = random_pairs(4 + rank, FEATURES, torch.float64)
    for layout in ("two_view", "one_way", "symmetric"):
        expected = ce.fused_infonce_loss(z1, z2, layout=layout)
        yield layout, ce.fused_infonce_loss(z1, z2, layout=layout, group=alone), expected


def _by_dtype(rank: int, world: int) -> dict:
    """By dtype: averaged loss and gradients of z1 and z2, and those of the whole batch."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z1, z2 = random_pairs(PAIRS, FEATURES, dtype)
        results = []
        for own in (_mine(rank, world), slice(None)):
            leaves = [z.clone().requires_grad_() for z in (z1, z2)]
            group = _group(world) if isinstance(own, Tensor) else None
            value = ce.fused_infonce_loss(*(z[own] for z in leaves), 0.1, group=group)
            grads = torch.autograd.grad(value, leaves)
            results.append(_averaged([value.detach(), *grads], world) if group else [value.detach(), *grads])
        found[str(dtype)] = results
    return found


def _said(call: Callable[[int], object], rank: int) -> str:
    try:
        call(rank)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _second_derivative(rank: int) -> object:
    z = Z.clone().requires_grad_()
    (first,) = torch.autograd.grad(ce.fused_infonce_loss(z, z, group=RING), [z], create_graph=True)
    return first.sum().backward()


def _second_derivative_of_sums(rank: int) -> object:
    z = Z.clone().requires_grad_()
    (first,) = torch.autograd.grad(ce.fused_sigmoid_loss(z, z, group=RING), [z], create_graph=True)
    return first.sum().backward()


def _run_everything(rank: int) -> dict:
    GROUPS[1] = [dist.new_group([r]) for r in range(WORLD)][rank]
    for world in UNEVEN:  # the first rank of a group is another of the default one
        GROUPS[world] = dist.new_group(range(WORLD - world, WORLD))
    results = {w: _run_world(dist.get_rank(group), w) for w, group in GROUPS.items() if w > 1 and rank >= WORLD - w}
    mistakes = {name: _said(call, rank % 2) for name, (call, _) in MISTAKES.items()}
    second = [_said(function, rank) for function in (_second_derivative, _second_derivative_of_sums)]
    return results | {"said": mistakes, "second derivatives": second}


def _run_world(rank: int, world: int) -> dict:
    results = {}
    for case in CASES[world]:
        torch.manual_seed(0)
        results[_case_name(*case)] = _against_whole_batch(rank, world, *case)
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        results[name] = list(function(rank, world))
    torch.manual_seed(0)
    return results | {"by_dtype": _by_dtype(rank, world)}


@pytest.fixture(scope="module")
def everyone(tmp_path_factory) -> list[dict]:
    """What each rank found, by the number of ranks that took part."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.fixture(scope="module")
def ranks(everyone) -> dict[int, list[dict]]:
    """What each of so many ranks found, by name."""
    return {world: [found[world] for found in everyone[WORLD - world :]] for world in UNEVEN}


@pytest.mark.parametrize(
    "world, loss, usage, backend",
    [pytest.param(w, *case, id=f"{w}-{_case_name(*case)}") for w, cases in CASES.items() for case in cases],
)
def test_a_ring_is_the_whole_batch(ranks, world, loss, usage, backend):
    for rank in ranks[world]:
        assert_same(rank[_case_name(loss, usage, backend)])


@pytest.mark.parametrize("world, name", list(itertools.product(UNEVEN, CHECKS)))
def test_ring(ranks, world, name):
    for rank in ranks[world]:
        assert_same(rank[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("world", UNEVEN)
def test_operands_of_every_dtype_are_sent_exactly(ranks, world, dtype):
    """Nothing is lost on the wire: what differs is the order of float32 sums, and the gradient's last rounding."""
    for rank in ranks[world]:
        ours, whole = rank["by_dtype"][str(dtype)]
        for a, b, precision in zip(ours, whole, (torch.float32, dtype, dtype), strict=True):
            assert a.dtype == b.dtype == precision
            atol = (torch.finfo(precision).eps + 64 * torch.finfo(torch.float32).eps) * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_ring_cannot_do_raises_on_every_rank(everyone, name):
    for rank in everyone:
        assert re.search(f"ValueError: .*{MISTAKES[name][1]}", rank["said"][name])


def test_a_second_derivative_raises(everyone):
    for said in itertools.chain(*(rank["second derivatives"] for rank in everyone)):
        assert re.search("RuntimeError: .* once differentiable", said)


def test_exchange_is_a_name():
    with pytest.raises(ValueError, match="exchange must be one of gather, ring; got 'scatter'"):
        ce.AllRanks(exchange="scatter")
