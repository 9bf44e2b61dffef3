"""torch.compile changes no value and no gradient of a call across ranks, whatever compiles around it.

Both ranks run everything in one go; tests look at what each of them found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from two_ranks import assert_same, on_both_ranks

IDS = torch.arange(6) // 2
Compared = list[tuple[str, Tensor, Tensor]]

# how the loss of (z1, z2, scale) is made out of a process group
LOSSES: dict[str, Callable] = {
    "two_view": lambda group, *z: ce.fused_debiased_loss(*z[:2], logit_scale=z[2], group=group),
    "one_way": lambda group, *z: ce.fused_infonce_loss(*z[:2], logit_scale=z[2], layout="one_way", group=group),
    "symmetric": lambda group, *z: ce.fused_infonce_loss(*z[:2], logit_scale=z[2], layout="symmetric", group=group),
    "negatives": lambda group, a, b, scale: ce.fused_hard_negative_loss(
        a, b, logit_scale=scale, layout="one_way", negatives=(a - b)[:2], ids=IDS, group=group
    ),
    "bayesian": lambda group, *z: ce.fused_bayesian_loss(*z[:2], logit_scale=z[2], group=group),
    "supcon": lambda group, a, b, scale: ce.fused_supcon_loss(torch.stack([a, b]), IDS, logit_scale=scale, group=group),
    "all ranks": lambda _, a, b, scale: ce.fused_debiased_loss(a, b, logit_scale=scale, group=ce.AllRanks()),
    "ring": lambda _, a, b, scale: ce.fused_debiased_loss(
        a, b, logit_scale=scale, ids=IDS, group=ce.AllRanks(exchange="ring")
    ),
    "ring of classes": lambda _, a, b, scale: ce.fused_supcon_loss(
        torch.stack([a, b]), IDS, logit_scale=scale, group=ce.AllRanks(exchange="ring")
    ),
    "module": lambda group, a, b, scale: ce.DebiasedLoss(group=group)(a, b, logit_scale=scale),
}
# the call is outside the graphs, so one more compiler around one of them is enough
COMPILED = [*((loss, "aot_eager") for loss in LOSSES), ("one_way", "eager")]


class _Step(nn.Module):
    """An encoder and a factor, so that there are graphs before and after the call."""

    def __init__(self, loss: Callable):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(7, 5, dtype=torch.float64)
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.loss, self.group = loss, dist.group.WORLD

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.encoder(x1).tanh(), self.encoder(x2).tanh()
        return 2 * self.loss(self.group, z1, z2, self.log_scale.exp())


def _inputs(rank: int) -> list[Tensor]:
    x = torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return [views.requires_grad_() for views in x.unbind(0)]


def _compiled(rank: int) -> dict[str, Compared]:
    found = {}
    for loss, compiler in COMPILED:
        torch._dynamo.reset()
        results = []
        for step in (torch.compile(_Step(LOSSES[loss]), backend=compiler), _Step(LOSSES[loss])):
            inputs = _inputs(rank)
            value = step(*inputs)
            results.append([value.detach(), *torch.autograd.grad(value, [*inputs, *step.parameters()])])
        labels = ("loss", *(f"gradient of {name}" for name in ("x1", "x2", "log_scale", "weight", "bias")))
        found[f"{loss}, {compiler}"] = list(zip(labels, *results, strict=True))
    return found


def _under_ddp(rank: int) -> Compared:
    results = []
    torch._dynamo.reset()
    for is_compiled in (True, False):
        parallel = DistributedDataParallel(_Step(LOSSES["two_view"]))
        step = torch.compile(parallel, backend="aot_eager") if is_compiled else parallel
        step(*_inputs(rank)).backward()
        results.append([p.grad for p in parallel.parameters()])
    return list(zip(("log_scale", "weight", "bias"), *results, strict=True))


def _queue(rank: int) -> Compared:
    ours, expected = (ce.NegativeQueue(7, 3, dtype=torch.float64) for _ in range(2))
    torch._dynamo.reset()
    step = torch.compile(lambda keys: ours.enqueue(keys / 2, group=ce.AllRanks()), backend="aot_eager")
    for _ in range(2):
        keys = torch.randn(2, 3, dtype=torch.float64)
        step(keys)
        expected.enqueue(keys / 2, group=dist.group.WORLD)
    return [(name, x, expected.state_dict()[name]) for name, x in ours.state_dict().items()]


def _in_one_graph(rank: int) -> str:
    """What asking for one graph says; before anything is exchanged, so that the other rank need not do the same."""
    torch._dynamo.reset()
    step = torch.compile(_Step(LOSSES["two_view"]), backend="eager", fullgraph=True)
    try:
        step(*_inputs(rank))
    except torch._dynamo.exc.Unsupported as error:
        return str(error)
    return "nothing"


def _run_everything(rank: int) -> dict:
    others = {"under DistributedDataParallel": _under_ddp(rank), "a queue": _queue(rank)}
    return _compiled(rank) | others | {"in one graph": _in_one_graph(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by name."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("loss, compiler", COMPILED)
def test_a_compiled_step_has_the_value_and_gradients_of_eager_mode(ranks, loss, compiler):
    for rank in ranks:
        assert_same(rank[f"{loss}, {compiler}"])


@pytest.mark.parametrize("name", ["under DistributedDataParallel", "a queue"])
def test_what_else_is_compiled_is_the_same(ranks, name):
    for rank in ranks:
        assert_same(rank[name])


def test_one_graph_is_refused_with_the_reason(ranks):
    assert all("compile without fullgraph=True" in rank["in one graph"] for rank in ranks)


def test_importing_the_package_does_not_import_the_compiler():
    said = "import sys, contrastive_ext; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True).stdout == "False\n"


_ALONE = """
import os, torch
import torch.distributed as dist
import contrastive_ext as ce

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
z = torch.randn(8, 4, requires_grad=True)
ce.fused_infonce_loss(z, 2 * z, layout="symmetric", group=ce.AllRanks()).backward()
names = lambda: [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(any("gloo" in name for name in names()))
dist.destroy_process_group()
print(any("gloo" in name for name in names()))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_the_threads_of_a_group_end_with_it():
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True)
    said = [word for word in done.stdout.split() if word in ("True", "False")]  # gloo of torch 2.10 talks there, too
    if said == ["False", "False"] and torch.__version__ < "2.11":
        pytest.skip("threads of gloo have no names in torch 2.10")
    assert said == ["True", "False"], done.stderr
