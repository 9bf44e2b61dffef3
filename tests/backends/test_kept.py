"""The `torch` backend keeps the matrix of a small problem: the same numbers, a bounded block, no guard in a graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing

import contrastive_ext as ce
from contrastive_ext.backends.torch import kept as torch_kept
from contrastive_ext.operators.row_stats import row_stats
from problems import IDS, PROBLEMS, make_problem
from rows import LOSSES, RANKED, USAGES, random_pairs

CPU = torch.device("cpu")


def all_roads(monkeypatch, function, leaves, one_block):
    """Results and gradients with all blocks kept, with bytes for one, then without."""
    outcomes, made = [], []
    forward = torch_kept.forward

    def watched(*args, **options):
        made.append(forward(*args, **options))
        return made[-1]

    monkeypatch.setattr(torch_kept, "forward", watched)
    for budget in (torch_kept.KEPT_BYTES, one_block, 0):
        monkeypatch.setattr(torch_kept, "KEPT_BYTES", budget)
        results = [y for y in function() if y.requires_grad]
        upstream = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) for y in results]
        finite = [y.where(y.isfinite(), 0.0) for y in results]
        gradients = torch.autograd.grad(finite, leaves, upstream, allow_unused=True)
        outcomes.append((results, gradients))
    return *outcomes, made


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_statistics_and_gradients_are_those_of_tiles(problem, monkeypatch):
    u, v, scale, options = make_problem(problem, CPU)
    leaves = [x.requires_grad_() for x in (u, v, scale) if isinstance(x, torch.Tensor)]

    aux = []

    def call():
        swept = row_stats(u, v, scale=scale, backend="torch", maximum=True, **options)
        aux.append((swept.aux, swept.col_aux))
        return swept.lse, swept.col_lse

    one_block = len(u) * len(u if v is None else v) * u.itemsize
    *kept, tiled, made = all_roads(monkeypatch, call, leaves, one_block)
    assert made[0] is not None and made[-1] is None
    for (results, gradients), some_aux in zip(kept, aux, strict=False):
        torch.testing.assert_close(results, tiled[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(some_aux, aux[-1], rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients, tiled[1], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_some_problems_keep_logits():
    """So that the test above compares them."""
    made = []
    for problem in PROBLEMS:
        u, v, scale, options = make_problem(problem, CPU)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_kept, "KEPT_BYTES", len(u) * len(u if v is None else v) * u.itemsize)
            forward = torch_kept.forward
            patch.setattr(torch_kept, "forward", lambda *a, f=forward, **o: made.append(f(*a, **o)) or made[-1])
            row_stats(u, v, scale=scale, backend="torch", **options)
    of_logits = [x for x in made if x is not None and x.sums[-1].dim() == 2]
    assert {len(x.sums) for x in of_logits} == {1, 2}  # of rows alone, of both directions
    assert {len(x.stats.lse) for x in of_logits} == {1, 2}  # exponents


@pytest.mark.parametrize(
    "loss, usage",
    [
        pytest.param(loss, usage, id=f"{loss.name}-{usage.name}")
        for loss in (LOSSES[0], RANKED[0])
        for usage in USAGES
        if (loss.name, usage.name) != ("bayesian", "own_negatives")  # undefined
    ],
)
def test_losses_are_those_of_tiles(loss, usage, monkeypatch):
    z1, z2 = (z.requires_grad_() for z in random_pairs(9, 5, torch.float64))
    z2, options = usage.options(z1, z2)

    def call():
        torch.manual_seed(0)
        return [loss.function(z1, z2, 0.4, reduction="none", backend="torch", **loss.parameters, **options)]

    *kept, tiled, _ = all_roads(monkeypatch, call, [z1], 18 * 18 * 8)
    for results, gradients in kept:
        torch.testing.assert_close(results, tiled[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, tiled[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "n, dtype, exponents, blocks",
    [
        (2048, torch.float32, (1.0,), 1),
        (2049, torch.float32, (1.0,), 0),
        (2048, torch.float32, (1.0, 2.0), 1),
        (2049, torch.float32, (1.0, 2.0), 0),
        (1448, torch.float32, (1.0, 2.0), 2),
        (1449, torch.float64, (1.0,), 0),
    ],
)
def test_what_is_kept_is_at_most_sixteen_mebibytes(n, dtype, exponents, blocks):
    u = torch.nn.functional.normalize(torch.randn(n, 2, dtype=dtype)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        row_stats(u, scale=5.0, exponents=exponents, num_images=n // 2 if n % 2 == 0 else n, backend="torch")
    matrices = [x for x in kept if x.dim() == 2 and x.shape == (n, n)]
    assert len(matrices) == blocks and sum(x.nbytes for x in matrices) <= 2**24


@pytest.mark.parametrize(
    "function", [ce.fused_infonce_loss, partial(ce.fused_bayesian_loss, ranks="exact")], ids=["infonce", "bayesian"]
)
def test_a_compiled_graph_has_no_guard_on_the_budget(function, monkeypatch):
    monkeypatch.setattr(torch_kept, "KEPT_BYTES", 4 * 20 * 20)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b: function(a, b, backend="torch"), backend=counter, dynamic=True, fullgraph=True
    )
    compilations = []
    for pairs in (8, 30):  # below and above it
        z1, z2 = (z.requires_grad_() for z in random_pairs(pairs, 4))
        ours = torch.autograd.grad(compiled(z1, z2), (z1, z2))
        torch.testing.assert_close(ours, torch.autograd.grad(function(z1, z2, backend="torch"), (z1, z2)))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1]


def test_a_second_derivative_is_refused():
    z1, z2 = (z.requires_grad_() for z in random_pairs(6, 4))
    (grad,) = torch.autograd.grad(ce.fused_infonce_loss(z1, z2, backend="torch"), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_backward_may_be_called_twice_and_inside_autocast():
    z1, z2 = (z.requires_grad_() for z in random_pairs(40, 16))
    for function in (ce.fused_hard_negative_loss, ce.fused_bayesian_loss):
        loss = function(z1, z2, backend="torch")
        first = torch.autograd.grad(loss, (z1, z2), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            second = torch.autograd.grad(loss, (z1, z2))
        assert all(map(torch.equal, first, second))
