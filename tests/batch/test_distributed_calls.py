"""What the ranks of a group agree on before they exchange anything, and which group that is.

Both ranks run everything in one go; tests look at what each of them found. Values: tests/batch/test_distributed.py.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from contrastive_ext.batch import distributed
from rows import random_pairs
from two_ranks import WORLD, assert_same, on_both_ranks

EVERYONE = ce.AllRanks()
EARLY = ce.InfoNCELoss(0.3, group=EVERYONE)  # made before there is a process group, in the children too
Z = torch.eye(6)[:, :3] + 0.1 * torch.arange(18.0).view(6, 3)
IDS = torch.arange(6)


def _infonce(z1: Tensor = Z, z2: Tensor = Z, *arguments, group: object = EVERYONE, **options):
    return ce.fused_infonce_loss(z1, z2, *arguments, group=group, **options)


def _one_way(**options):
    return _infonce(layout="one_way", **options)


def _supcon(labels: Tensor = IDS // 2, features: Tensor = Z, **options):
    return ce.fused_supcon_loss(features, labels, group=EVERYONE, **options)


def _soft(keys: Tensor = Z, **options):
    return ce.fused_soft_target_loss(Z, keys, Z, teacher_temperature=0.1, group=EVERYONE, **options)


def _sane(**options):
    return ce.fused_self_labeling_loss(Z, Z, None, group=EVERYONE, **options)


def _fnc(**options):
    return ce.fused_false_negative_loss(torch.stack([Z, Z]), group=EVERYONE, **options)


def _enqueue(keys: Tensor = Z, **options):
    ce.NegativeQueue(7, 3).enqueue(keys, group=EVERYONE, **options)


def _without_gradient(wanted: bool):
    with torch.set_grad_enabled(not wanted):
        return _infonce(Z.clone().requires_grad_())


class _Half(ce.RowLoss):
    """No dataclass: nothing but its name can be compared."""

    def from_stats(self, stats):
        return 0.5 * stats.lse[0]


# name -> what rank r of two calls, and what both say then
DIFFERENCES: dict[str, tuple[Callable[[int], object], str]] = {
    "pairs": (lambda r: _infonce(Z[: 5 + r], Z[: 5 + r]), r"z1 is .* \[5, 3\] on cpu on rank 0, .* \[6, 3\] .*; z2 is"),
    "columns": (lambda r: _one_way(z1=Z[:3], z2=Z[: 5 + r]), r"but z2 is .* \[5, 3\] .* \[6, 3\]"),
    "row length": (lambda r: _infonce(Z[:, : 2 + r], Z[:, : 2 + r]), r"z1 is .* \[6, 2\] .* \[6, 3\]"),
    "dtype": (lambda r: _infonce(*[Z.to((torch.half, torch.double)[r])] * 2), r"z1 is torch.float16 .* torch.float64"),
    "gradient": (
        lambda r: _one_way(z2=Z.clone().requires_grad_(r == 1)),
        r"z2 is .* rank 0, .* with gradient on rank 1",
    ),
    "no_grad": (lambda r: _without_gradient(r == 0), r"z1 is .* on cpu on rank 0, .* with gradient on rank 1"),
    "layout": (lambda r: _infonce(layout=("one_way", "symmetric")[r]), "layout is 'one_way' on rank 0, 'symmetric' on"),
    "reduction": (lambda r: _infonce(reduction=("mean", "sum")[r]), "reduction is 'mean' on rank 0, 'sum' on rank 1"),
    "normalize": (lambda r: _infonce(normalize=r == 0), "normalize is True on rank 0, False on rank 1"),
    "temperature": (lambda r: _infonce(Z, Z, 0.5 + r), "temperature is 0.5 on rank 0, 1.5 on rank 1"),
    "learned": (lambda r: _infonce(Z, Z, (0.5, torch.tensor(0.5))[r]), r"temperature is 0.5 .*, torch.float32 \[\]"),
    "logit_scale": (lambda r: _infonce(logit_scale=(None, 2.0)[r]), "logit_scale is None on rank 0, 2.0 on rank 1"),
    "operand_dtype": (
        lambda r: _infonce(operand_dtype=(torch.float16, torch.bfloat16)[r]),
        "operand_dtype is torch.float16 on rank 0, torch.bfloat16 on rank 1",
    ),
    "in_batch_negatives": (
        lambda r: _one_way(negatives=Z, in_batch_negatives=r == 0),
        "in_batch_negatives is True on rank 0, False on rank 1",
    ),
    "ids": (lambda r: _infonce(ids=(None, IDS)[r]), r"but ids is None on rank 0, torch.int64 \[6\] on cpu on rank 1"),
    "guide": (lambda r: _infonce(guide=(None, (Z, Z))[r]), r"but guide is None on rank 0, \(torch.float32 \[6, 3\]"),
    "width of a guide": (lambda r: _infonce(guide=(Z[:, : 2 + r],) * 2), r"but guide is \(torch.float32 \[6, 2\]"),
    "margin": (
        lambda r: _infonce(guide=ce.Guide(Z, Z, 0.1 * r)),
        r"guide is Guide\(.*margin=0.0.* on rank 0, .*=0.1",
    ),
    "negatives": (lambda r: _one_way(negatives=Z[: 2 + r]), r"but negatives is .* \[2, 3\] .* \[3, 3\]"),
    "queue": (lambda r: _infonce(queue=Z[: 2 + r]), r"but queue is .* \[2, 3\] .* \[3, 3\]"),
    "size of a queue": (lambda r: _infonce(queue=ce.NegativeQueue(7 + r, 3)), "queue is .*size=7.* rank 0, .*size=8"),
    "prior": (lambda r: ce.fused_debiased_loss(Z, Z, tau_plus=0.1 * r, group=EVERYONE), "tau_plus is 0.0 .*, 0.1 on"),
    "loss": (
        lambda r: (ce.fused_infonce_loss, ce.fused_debiased_loss)[r](Z, Z, group=EVERYONE),
        r"but function is fused_infonce_loss on rank 0, fused_debiased_loss on rank 1\.$",
    ),
    "parameters of a module": (
        lambda r: ce.HardNegativeLoss(beta=1.0 + r, group=EVERYONE)(Z, Z),
        r"row_loss is HardNegative\(tau_plus=0.1, beta=1.0, detach_weights=False\) on rank 0, .*beta=2.0",
    ),
    "a loss of one's own": (
        lambda r: ce.fused_row_loss((ce.InfoNCE(), _Half())[r], Z, Z, group=EVERYONE),
        r"row_loss is InfoNCE\(.*\) on rank 0, _Half on rank 1",
    ),
    "one enqueues": (
        lambda r: (_infonce, _enqueue)[r](),
        "function is fused_infonce_loss on rank 0, enqueue on rank 1",
    ),
    "keys": (lambda r: _enqueue(Z[: 2 + r]), r"but keys is .* \[2, 3\] .* \[3, 3\]"),
    "supcon": (lambda r: _supcon(positives=("out", "in")[r]), "positives is 'out' on rank 0, 'in' on rank 1"),
    "views": (
        lambda r: _supcon(IDS[: 6 - r], Z[: 6 - r].expand(2, -1, -1)),
        r"features is .* \[2, 6, 3\] .* \[2, 5, 3\]",
    ),
    "soft targets": (lambda r: _soft(Z[: 5 + r]), r"but keys is .* \[5, 3\] .* \[6, 3\]"),
    "self-labelling": (lambda r: _sane(label_temperature=0.5 + r), "label_temperature is 0.5 on rank 0, 1.5 on rank 1"),
    "false negatives": (lambda r: _fnc(top_k=1 + r), "top_k is 1 on rank 0, 2 on rank 1"),
    "labels to report": (lambda r: _fnc(labels=(None, IDS)[r]), r"labels is None on rank 0, torch.int64 \[6\]"),
}

# name -> what rank r of two calls, where rank 1 alone is wrong, and how; rank 0 quotes it
REFUSALS: dict[str, tuple[Callable[[int], object], type[Exception], str]] = {
    "temperature": (lambda r: _infonce(Z, Z, (0.5, -1.0)[r]), ValueError, "temperature must be > 0"),
    "prior": (
        lambda r: ce.fused_debiased_loss(Z, Z, tau_plus=r, group=EVERYONE),
        ValueError,
        r"tau_plus is .* \[0, 1\); got 1",
    ),
    "no tensor": (lambda r: _infonce((Z, Z.tolist())[r]), TypeError, "z1 must be a tensor; got list"),
    "no tensors": (lambda r: _infonce(*((Z, None)[r],) * 2), TypeError, "z1 must be a tensor; got NoneType"),
    "shape": (lambda r: _infonce(Z, Z[: 6 - r]), ValueError, r"same shape \[B, D\]; got \[6, 3\] and \[5, 3\]"),
    "layout": (lambda r: _infonce(layout=("two_view", "three_view")[r]), ValueError, "layout must be one of"),
    "reduction": (lambda r: _infonce(reduction=("mean", "median")[r]), ValueError, "reduction must be one of"),
    "keyword": (lambda r: _infonce(**({}, {"temprature": 1.0})[r]), TypeError, "temprature"),
    "backend": (lambda r: _infonce(backend=("auto", "cuda")[r]), RuntimeError, "backend 'cuda' cannot run this call"),
    "loss": (
        lambda r: ce.fused_row_loss((ce.InfoNCE(), "infonce")[r], Z, Z, group=EVERYONE),
        TypeError,
        "must be a RowLoss",
    ),
    "weights": (
        lambda r: ce.fused_decoupled_loss(Z, Z, positive_weight=torch.ones(6 - r), group=EVERYONE),
        ValueError,
        r"positive_weight must be floating-point \[6\]",
    ),
    "margin": (lambda r: _infonce(guide=ce.Guide(Z, Z, 1e39 * r)), ValueError, "margin must be finite"),
    "labels": (lambda r: _supcon(IDS[: 6 - r]), ValueError, r"labels must be integers \[6\]"),
    "supcon's temperature": (lambda r: _supcon(temperature=(0.5, 0.0)[r]), ValueError, "temperature must be > 0"),
    "supcon's backend": (lambda r: _supcon(backend=("auto", "cuda")[r]), RuntimeError, "backend 'cuda' cannot run"),
    "a teacher's keys": (lambda r: _soft((Z, Z[:, :2])[r]), ValueError, "keys must be"),
    "a teacher's queue": (lambda r: _soft(queue=(Z, Z[:, :2])[r]), ValueError, "queue must be"),
    "a teacher's backend": (lambda r: _soft(backend=("auto", "cuda")[r]), RuntimeError, "backend 'cuda' cannot run"),
    "share": (lambda r: _sane(lam=2.0 * r), ValueError, "lam, the share of the mixed term"),
    "sane's temperature": (lambda r: _sane(temperature=(0.5, 0.0)[r]), ValueError, "temperature must be > 0"),
    "sane's backend": (lambda r: _sane(backend=("auto", "cuda")[r]), RuntimeError, "backend 'cuda' cannot run"),
    "fnc's labels": (lambda r: _fnc(labels=IDS[: 6 - r]), ValueError, r"labels must be integers \[6\]"),
    "fnc's temperature": (lambda r: _fnc(temperature=(0.5, 0.0)[r]), ValueError, "temperature must be > 0"),
    "fnc's backend": (lambda r: _fnc(backend=("auto", "cuda")[r]), RuntimeError, "backend 'cuda' cannot run"),
    "keys": (lambda r: _enqueue((Z, Z[:, :2])[r]), ValueError, r"keys must be floating-point \[n, 3\]"),
}


def _said(call: Callable[[int], object], rank: int) -> str:
    try:
        call(rank)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _mistakes(rank: int) -> dict[str, str]:
    """What each mistake says on this rank; after each of them the ranks still understand one another."""
    said = {}
    expected = ce.fused_infonce_loss(Z, Z, group=dist.group.WORLD)
    for kind, mistakes in (("differs", DIFFERENCES), ("refused", REFUSALS)):
        for name, (call, *_) in mistakes.items():
            said[f"{kind}: {name}"] = _said(call, rank)
            assert torch.equal(_infonce(), expected), f"after {name}"
    of_the_other = [dist.new_group([r]) for r in range(WORLD)][1 - rank]
    z = Z.clone().requires_grad_()
    (first,) = torch.autograd.grad(_infonce(z, z), [z], create_graph=True)
    said["name"] = _said(lambda r: _infonce(group="world"), rank)
    said["no member"] = _said(lambda r: _infonce(group=of_the_other), rank)
    said["second derivative"] = _said(lambda r: first.sum().backward(), rank)
    return said


def _all_ranks(rank: int) -> list[tuple[str, Tensor, Tensor]]:
    z1, z2 = random_pairs(4, 3, torch.float64)
    expected = ce.fused_infonce_loss(z1, z2, 0.3, group=dist.group.WORLD)
    copies = {"made early": EARLY, "copied": copy.deepcopy(EARLY), "pickled": pickle.loads(pickle.dumps(EARLY))}
    found = [(name, module(z1, z2), expected) for name, module in copies.items()]
    again = EARLY(z1, z2, group=None)  # a call may say otherwise
    return [*found, ("alone", again, ce.fused_infonce_loss(z1, z2, 0.3))]


def _own_business(rank: int) -> list[tuple[str, Tensor, Tensor]]:
    """A rank may choose its backend, and whether it wants statistics."""
    z1, z2 = random_pairs(4, 3, torch.float64)
    expected = _infonce(z1, z2)
    ours = _infonce(z1, z2, backend=("torch", "reference")[rank], return_stats=rank == 0)
    return [("loss", ours[0] if rank == 0 else ours, expected)]


def _exchanges(rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """The shape of everything that is gathered for one call, and for one over prefixes."""
    shapes, original = [], distributed._all_gather

    def recorded(local: Tensor, group: dist.ProcessGroup) -> Tensor:
        shapes.append(list(local.shape))
        return original(local, group)

    distributed._all_gather = recorded
    _infonce(Z, Z, ids=IDS)
    pairs, shapes = shapes, []
    ce.fused_row_loss(ce.Matryoshka(ce.InfoNCE(), (1, 2, 3)), Z, Z, group=ce.AllRanks())
    distributed._all_gather = original
    return pairs, shapes


def _queues_under_ddp(rank: int) -> dict[str, Tensor]:
    """The queue that a module under DistributedDataParallel holds after its next forward; rank r's keys are r."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.queue, self.linear = ce.NegativeQueue(4, 1), nn.Linear(1, 1)

        def forward(self, x):
            return self.linear(x)

    kept = {}
    for name, group in (("gathered", ce.AllRanks()), ("local", None)):
        model = DistributedDataParallel(Model())
        model.module.queue.enqueue(torch.full((2, 1), float(rank)), group=group)
        model(torch.ones(1, 1))
        kept[name] = model.module.queue.data.flatten().clone()
    return kept


def _run_everything(rank: int) -> dict:
    torch.manual_seed(rank)
    functions = (_mistakes, _all_ranks, _own_business, _exchanges, _queues_under_ddp)
    return {function.__name__: function(rank) for function in functions}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by function."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_calls_that_differ_raise_on_every_rank_and_name_it(ranks, name):
    for rank in ranks:
        said = rank["_mistakes"][f"differs: {name}"]
        assert re.search(f"ValueError: every rank of the group must make the same call, .*{DIFFERENCES[name][1]}", said)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_one_rank_refuses_every_rank_raises(ranks, name):
    _, error, says = REFUSALS[name]
    assert re.search(f"^{error.__name__}: .*{says}", ranks[1]["_mistakes"][f"refused: {name}"])
    told = rf"^ValueError: rank 1 of the group refused this call: {error.__name__}: .*{says}"
    assert re.search(told, ranks[0]["_mistakes"][f"refused: {name}"])


@pytest.mark.parametrize(
    "mistake, says",
    [
        ("name", r"TypeError: group must be AllRanks\(\), a torch.distributed.ProcessGroup .* got 'world'"),
        ("no member", r"TypeError: group must be .* that this process belongs to"),
        ("second derivative", r"RuntimeError: .* once differentiable"),
    ],
)
def test_mistakes_about_the_group(ranks, mistake, says):
    for rank in ranks:
        assert re.search(says, rank["_mistakes"][mistake])


@pytest.mark.parametrize("call", [_infonce, _supcon, _soft, _sane, _fnc, _enqueue, lambda: EARLY(Z, Z)])
def test_all_ranks_needs_an_initialised_group(call):
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        call()


def test_all_ranks_is_a_value():
    everyone = ce.AllRanks()
    assert everyone == copy.deepcopy(everyone) == pickle.loads(pickle.dumps(everyone))
    assert pickle.loads(pickle.dumps(EARLY)).options == copy.deepcopy(EARLY).options == EARLY.options


@pytest.mark.parametrize("name", ["_all_ranks", "_own_business"])
def test_same_values(ranks, name):
    for rank in ranks:
        assert_same(rank[name])


def test_ranks_agree_in_one_exchange_of_three_numbers(ranks):
    for rank in ranks:
        pairs, prefixes = rank["_exchanges"]
        assert pairs == [[1, 3], [12, 3], [12]]  # then columns and their ids
        assert prefixes == [[1, 3], [12, 1], [12, 2], [12, 3]]


def test_buffers_of_ddp_overwrite_queues_that_were_not_gathered(ranks):
    """As `NegativeQueue` documents."""
    for rank in ranks:
        assert rank["_queues_under_ddp"]["gathered"].tolist() == [0, 0, 1, 1]
        assert rank["_queues_under_ddp"]["local"].tolist() == [0, 0, 0, 0]  # rank 0's two keys, the rest unfilled
