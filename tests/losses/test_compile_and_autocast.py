"""One graph under torch.compile, the same result under autocast, and gradients in the inputs' dtype."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import contrastive_ext as ce
from promises import check_autocast_changes_nothing, check_one_graph
from rows import LOSSES, USAGES, random_pairs

# A graph is an arrangement of the batch, which a usage decides, and a formula over its rows. The formula meets rows
# sure to have negatives and rows that ids may leave empty. The arrangement meets three kinds of losses: one exponent
# and a vector of weights, one and more positives, two exponents. Other pairs of the tables repeat what these trace.
FORMULAS = [(loss, usage) for loss in LOSSES for usage in USAGES if usage.name in ("two_view", "ids")]
ARRANGED = [(loss, usage) for loss in LOSSES for usage in USAGES if loss.name in ("dclw", "debiased_positives", "hard")]
GRAPHS = {f"{loss.name}-{usage.name}": (loss, usage) for loss, usage in FORMULAS + ARRANGED}


@pytest.mark.parametrize("loss, usage", GRAPHS.values(), ids=GRAPHS)
def test_compiles_into_one_graph(run, loss, usage):
    check_one_graph(run, loss, usage)


def test_batch_size_may_vary_in_one_graph(run):
    backend, device = run
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b: ce.fused_debiased_loss(a, b, 0.5, backend=backend), fullgraph=True, dynamic=True, backend=counter
    )
    compiled_so_far = 0
    for b in (5, 8, 13, 21):
        z1, z2 = random_pairs(b, 4, torch.float32, device)
        torch.testing.assert_close(compiled(z1, z2), ce.fused_debiased_loss(z1, z2, 0.5, backend=backend))
        compiled_so_far = compiled_so_far or counter.frame_count
    assert counter.frame_count == compiled_so_far


def test_numbers_may_be_symbolic(run):
    backend, device = run
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, t, tau: ce.fused_debiased_loss(a, b, t, tau, backend=backend),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    z1, z2 = random_pairs(6, 4, torch.float32, device)
    for numbers in ((0.5, 0.1), (0.4, 0.05)):
        torch.testing.assert_close(
            compiled(z1, z2, *numbers), ce.fused_debiased_loss(z1, z2, *numbers, backend=backend)
        )


def test_statistics_compile_too(run):
    backend, device = run
    torch._dynamo.reset()
    z1, z2 = random_pairs(6, 4, torch.float32, device)
    step = torch.compile(
        lambda a, b: ce.fused_hard_negative_loss(a, b, 0.5, return_stats=True, backend=backend),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    _, stats = step(z1, z2)
    assert 0 <= stats.accuracy.item() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_autocast_changes_nothing(run, loss, dtype):
    check_autocast_changes_nothing(run, loss, dtype)


@pytest.mark.parametrize("features", [16, 300], ids=["few_features", "many_features"])
@pytest.mark.parametrize("extras", ["plain", "queue", "ids", "statistics"])
def test_a_gradient_taken_inside_autocast_is_the_same(run, extras, features):
    backend, device = run
    z1, z2 = random_pairs(9, features, torch.float32, device)
    queue, ids = torch.randn(7, features, device=device), torch.arange(9, device=device) % 4
    options = {"plain": {}, "queue": {"queue": queue}, "ids": {"ids": ids}, "statistics": {"return_stats": True}}
    results = []
    for enabled in (False, True):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            value = ce.fused_infonce_loss(*leaves, 0.2, backend=backend, **options[extras])
            value = value[0] if isinstance(value, tuple) else value
            results.append(torch.autograd.grad(value, leaves))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_come_back_in_the_input_dtype(run, dtype):
    backend, device = run
    leaves = [z.requires_grad_() for z in random_pairs(9, 16, dtype, device)]
    value = ce.fused_hard_negative_loss(*leaves, backend=backend)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(z.grad.dtype == dtype for z in leaves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_in_a_cuda_graph(run):
    backend, device = run
    if device.type != "cuda":
        pytest.skip("graphs are a GPU's")
    z1, z2 = (z.requires_grad_() for z in random_pairs(64, 32, torch.float32, device))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            ce.fused_debiased_loss(z1, z2, backend=backend).backward()
    torch.cuda.current_stream().wait_stream(side)
    z1.grad = z2.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = ce.fused_debiased_loss(z1, z2, backend=backend)
        value.backward()
    graph.replay()
    expected = ce.fused_debiased_loss(z1.detach(), z2.detach(), backend=backend)
    torch.testing.assert_close(value, expected)
