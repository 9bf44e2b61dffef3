"""Who meets whom beyond pairs: several directions in one sum, positives by index, further columns with what is known of
them, hardness, a temperature for every row. test_truth.py holds values and gradients; here is what must not break."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import contrastive_ext as ce
from peak_memory import needs_proc, peak_growth
from rows import random_pairs

B, D, TRACED, OTHERS = 5, 4, 12, (3, 29)


@dataclass(frozen=True)
class Case:
    """A call made of tensors by batch size; smooth: its gradient is a function's derivative."""

    tensors: Callable[[int], dict[str, Tensor]]
    call: Callable[..., Tensor]
    smooth: bool = True


def _pairs(b: int, more: int = 0, **others: Callable[[int], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(b)
    z1, z2 = random_pairs(b + more, D, torch.float64)
    return {"z1": z1[:b], "z2": z2} | {name: make(b) for name, make in others.items()}


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda b: torch.randn(b, *shape, dtype=torch.float64)


CASES = {
    "all directions": Case(
        lambda b: _pairs(b, 3, ids=lambda b: torch.arange(b + 3) % 7),
        lambda z1, z2, ids, **o: ce.fused_infonce_loss(z1, z2, 0.4, layout=("q2d", "q2q", "d2q", "d2d"), ids=ids, **o),
    ),
    "decoupled": Case(
        lambda b: _pairs(b), lambda z1, z2, **o: ce.fused_decoupled_loss(z1, z2, 0.4, layout=("q2d", "q2q"), **o)
    ),
    "positive index": Case(
        lambda b: _pairs(b, index=lambda b: torch.arange(b).flip(0) // 2),
        lambda z1, z2, index, **o: ce.fused_hard_negative_loss(z1, z2, layout="one_way", positive_index=index, **o),
    ),
    "own negatives with ids and a guide": Case(
        lambda b: _pairs(b, n=_normal(3, D), g=_normal(2), gn=_normal(3, 2), ids=lambda b: torch.arange(3 * b) % 4),
        lambda z1, z2, n, g, gn, ids, **o: ce.fused_infonce_loss(
            z1, z2, layout="one_way", ids=ids[: z1.shape[0]], guide=(g, 2 * g),
            negatives=ce.Columns(n, ids=ids.reshape(-1, 3), guide=gn), **o,
        ),
    ),
    "the rows as their guide": Case(
        lambda b: _pairs(b, 2, n=_normal(D)),
        lambda z1, z2, n, **o: ce.fused_infonce_loss(
            z1, z2, layout=("q2d", "d2q"), guide=ce.Guide.own(-0.1), negatives=n, **o
        ),
        smooth=False,
    ),
    "symmetric with more": Case(
        lambda b: _pairs(b, 2, n=_normal(2, D)),
        lambda z1, z2, n, **o: ce.fused_debiased_loss(z1, z2, 1.0, layout="symmetric", negatives=n, **o),
    ),
    "hardness": Case(
        lambda b: _pairs(b, 2, n=_normal(2, D)),
        lambda z1, z2, n, **o: ce.fused_infonce_loss(
            z1, z2, layout="one_way", negatives=n, hardness=2.0, hardness_on="all", **o
        ),
        smooth=False,
    ),
    "a temperature for every row": Case(
        lambda b: _pairs(b, 2, t=lambda b: 0.4 + torch.rand(b, dtype=torch.float64)),
        lambda z1, z2, t, **o: ce.fused_hard_negative_loss(z1, z2, t, layout="one_way", **o),
    ),
    "a prior for every pair of the Bayesian loss": Case(
        lambda b: _pairs(b, p=lambda b: 0.2 * torch.rand(b, dtype=torch.float64)),
        lambda z1, z2, p, backend="auto", **o: ce.fused_bayesian_loss(
            z1, z2, 0.5, p, ranks="exact", backend=backend if backend == "reference" else "auto", **o
        ),
        smooth=False,
    ),
    "weights of a queue and a learned temperature": Case(
        lambda b: _pairs(b, queue=_normal(D), w=_normal(), t=lambda b: 0.4 + torch.zeros((), dtype=torch.float64)),
        lambda z1, z2, queue, w, t, **o: ce.fused_hard_negative_loss(
            z1, z2, t, queue=ce.Columns(queue.detach(), log_weight=w), normalize=False, **o
        ),
    ),
    "weights of negatives": Case(
        lambda b: _pairs(b, n=_normal(3, D), w=_normal(3)),
        lambda z1, z2, n, w, **o: ce.fused_infonce_loss(
            z1, z2, layout="one_way", negatives=ce.Columns(n, log_weight=w), **o
        ),
    ),
    "weights and hardness": Case(
        lambda b: _pairs(b, n=_normal(D), w=_normal()),
        lambda z1, z2, n, w, **o: ce.fused_infonce_loss(
            z1, z2, layout=("q2d", "q2q"), negatives=ce.Columns(n, log_weight=w), hardness=2.0, **o
        ),
        smooth=False,
    ),
}  # fmt: skip


def _floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that get a gradient: guides, g and gn, weights, priors and a queue are constants."""
    constants = ("g", "gn", "w", "p", "queue")
    return {name: x for name, x in tensors.items() if x.is_floating_point() and name not in constants}


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.smooth], ids=[n for n in CASES if CASES[n].smooth])
def test_gradcheck(run, case):
    backend, device = run
    tensors = {name: x.to(device) for name, x in case.tensors(B).items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in _floating(tensors).items()}

    def function(*values: Tensor) -> Tensor:
        return case.call(**{**tensors, **dict(zip(leaves, values, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_second_derivatives_of_the_reference(case):
    tensors = case.tensors(B)
    leaves = [x.detach().clone().requires_grad_() for x in (tensors["z1"], tensors["z2"])]
    value = case.call(**{**tensors, "z1": leaves[0], "z2": leaves[1]}, backend="reference")
    first = torch.autograd.grad(value, leaves, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_for_every_batch_size(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (TRACED, *OTHERS):
        tensors = case.tensors(b)
        results = []
        for function in (case.call, compiled):
            leaves = {name: x.detach().clone().requires_grad_() for name, x in _floating(tensors).items()}
            value = function(**{**tensors, **leaves})
            results.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


class Step(torch.nn.Module):
    """What torch.export takes."""

    def __init__(self, call: Callable[..., Tensor]):
        super().__init__()
        self.call = call

    def forward(self, tensors: dict) -> Tensor:
        return self.call(**tensors)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exports(case):
    batch, traced, larger = Dim("batch", min=min(OTHERS), max=4096), case.tensors(TRACED), case.tensors(TRACED + 1)

    def open_sizes(name: str) -> dict:
        sizes = enumerate(zip(traced[name].shape, larger[name].shape, strict=True))
        return {i: (m - n) * batch + (n - (m - n) * TRACED) for i, (n, m) in sizes if n != m}

    torch._dynamo.reset()
    shapes = ({name: open_sizes(name) for name in traced},)
    program = torch.export.export(Step(case.call), (traced,), dynamic_shapes=shapes, strict=False).module()
    for b in (TRACED, *OTHERS):
        torch.testing.assert_close(program(case.tensors(b)), case.call(**case.tensors(b)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_repeats_bit_for_bit(run, case):
    backend, device = run
    tensors = {name: x.to(device) for name, x in case.tensors(33).items()}
    results = []
    for _ in range(2):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in _floating(tensors).items()}
        value = case.call(**{**tensors, **leaves}, backend=backend)
        results.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_proc
@pytest.mark.parametrize(
    "how",
    [
        "layout=('q2d', 'q2q', 'd2q', 'd2d')",
        "layout='one_way', positive_index=index",
        "queue=ce.Columns(queue, log_weight=-index.float().log1p())",
    ],
)
def test_memory_is_linear(how):
    setup = (
        "z1, z2 = (torch.randn(n, 64).requires_grad_() for _ in range(2)); index = torch.arange(n).flip(0) // 2; "
        "queue = torch.nn.functional.normalize(torch.randn(n, 64), dim=1)"
    )
    n = 6144
    growth = peak_growth(setup, f"ce.fused_infonce_loss(z1, z2, 0.5, {how}).backward()", small=16, large=n)
    assert 0 < growth <= 80 * 2**20, f"{growth / 2**20:.0f} MiB; one matrix is {n * n * 4 / 2**20:.0f} MiB"


Z = torch.randn(4, 3)
UNIT = torch.nn.functional.normalize(Z, dim=1)
INDEX = torch.arange(4)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: ce.fused_infonce_loss(Z, Z, layout=("q2q",)), ValueError, "holds 'q2d' and some of q2q, d2q, d2d"),
        (lambda: ce.fused_infonce_loss(Z, Z, layout=("q2d", "q2d")), ValueError, "a tuple as layout"),
        (lambda: ce.fused_infonce_loss(Z, Z, layout=("q2d", "d2x")), ValueError, "a tuple as layout"),
        (lambda: ce.fused_infonce_loss(Z, Z, layout=["q2d", "q2q"]), ValueError, "or a tuple of directions"),
        (lambda: ce.fused_debiased_loss(Z, Z, layout=("q2d", "q2q")), ValueError, "Debiased is not defined for layout"),
        (lambda: ce.fused_bayesian_loss(Z, Z, layout=("q2d", "q2q")), ValueError, "Bayesian is not defined"),
        (lambda: ce.fused_infonce_loss(Z, Z, positive_index=INDEX), ValueError, "needs layout='one_way'"),
        (
            lambda: ce.fused_infonce_loss(Z, Z, layout="one_way", positive_index=INDEX + 1),
            ValueError,
            "rows of z2, 0 to 3",
        ),
        (lambda: ce.fused_infonce_loss(Z, Z, layout="one_way", positive_index=INDEX.int()), ValueError, "int64"),
        (lambda: ce.fused_infonce_loss(Z, Z, hardness=1.0), ValueError, "hardness needs layout='one_way'"),
        (lambda: ce.fused_infonce_loss(Z, Z, hardness=-1.0), ValueError, "finite and >= 0"),
        (lambda: ce.fused_infonce_loss(Z, Z, hardness_on="hard"), ValueError, "hardness_on must be one of"),
        (lambda: ce.fused_infonce_loss(Z, Z, torch.ones(4)), ValueError, "0-d"),
        (lambda: ce.fused_infonce_loss(Z, Z, torch.ones(3), layout="one_way"), ValueError, r"\[4\] for the rows"),
        (lambda: ce.fused_infonce_loss(Z, Z, INDEX.float(), layout="one_way"), ValueError, "must be > 0"),
        (
            lambda: ce.fused_infonce_loss(Z, Z, torch.ones(4), layout="one_way", hardness=1.0),
            ValueError,
            "one temperature for all rows",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, layout="one_way", negatives=ce.NegativeQueue(4, 3)),
            TypeError,
            "given as queue=",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, layout="one_way", negatives=ce.Columns(Z, ids=INDEX)),
            ValueError,
            "ids of negatives are compared",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, guide=ce.Guide.own(), queue=ce.Columns(Z, guide=Z)),
            ValueError,
            "need guide=",
        ),
        (
            lambda: ce.fused_infonce_loss(
                Z, Z, layout="one_way", in_batch_negatives=False, queue=Z, positive_index=INDEX
            ),
            ValueError,
            r"z2\[positive_index\]",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, queue=ce.Columns(UNIT, log_weight=INDEX)),
            ValueError,
            r"log_weight of queue must be floating-point \[4\]",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, layout="one_way", negatives=ce.Columns(Z, log_weight=torch.ones(3))),
            ValueError,
            r"log_weight of negatives must be floating-point \[4\]",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, queue=ce.Columns(UNIT, log_weight=-INDEX * math.inf)),
            ValueError,
            "left out by ids",
        ),
        (
            lambda: ce.fused_infonce_loss(Z, Z, queue=ce.Columns(UNIT, log_weight=torch.ones(4).requires_grad_())),
            ValueError,
            "give log_weight.detach()",
        ),
        (
            lambda: ce.fused_bayesian_loss(Z, Z, queue=ce.Columns(UNIT, log_weight=torch.ones(4))),
            ValueError,
            "by its rank",
        ),
        (
            lambda: ce.fused_bayesian_loss(Z, Z, 0.5, torch.full((4,), 0.1), backend="cpu"),
            RuntimeError,
            "weighs ranks by one prior for all rows",
        ),
        (lambda: ce.fused_bayesian_loss(Z, Z, 0.5, torch.full((3,), 0.1)), ValueError, r"\[4\] or \[8\]"),
        (
            lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), queue=ce.Columns(UNIT, log_weight=torch.ones(4))),
            ValueError,
            "no guide or log_weight",
        ),
    ],
)
def test_what_is_undefined_says_so(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_positive_alone_may_stand_in_the_sum_twice(run):
    """One pair and no negative: -log(e^p / (2 e^p)), as the direction's own denominator has it."""
    backend, device = run
    for name in (backend, "reference"):
        z1, z2 = (torch.randn(1, D, device=device).requires_grad_() for _ in range(2))
        loss = ce.fused_infonce_loss(z1, z2, layout=("q2d", "d2q"), backend=name)
        torch.testing.assert_close(loss, torch.tensor(2.0, device=device).log())
        assert all(not g.any() for g in torch.autograd.grad(loss, (z1, z2)))
