"""What only a GPU can get wrong around the kernels: streams, graphs, waits for the device; for every GPU backend."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.backends import dispatch
from rows import random_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda")
LOSSES = [ce.fused_infonce_loss, ce.fused_debiased_loss]  # one exponent: what every GPU backend computes


def _backends() -> list:
    names = []
    for backend in dispatch.BACKENDS:
        if torch.cuda.is_available():
            reason = backend.why_not(DEVICE, torch.float32, torch.bfloat16, 128)
        else:
            reason = "needs a GPU"
        names.append(pytest.param(backend.name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return names


@pytest.fixture(params=_backends())
def backend(request) -> str:
    return request.param


@pytest.fixture
def leaves():
    return [z.requires_grad_() for z in random_pairs(200, 128, torch.bfloat16, DEVICE)]


def _step(loss, leaves, temperature, backend):
    value = loss(*leaves, temperature, backend=backend)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("learned", [False, True], ids=["number", "tensor"])
def test_nothing_waits_for_the_device(backend, leaves, loss, learned):
    temperature = torch.tensor(0.2, device=DEVICE) if learned else 0.2
    expected = _step(loss, leaves, temperature, backend)  # also compiles and fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = _step(loss, leaves, temperature, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_graph_replays_the_step_on_new_inputs(backend, leaves, loss):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(loss, leaves, 0.2, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(loss, leaves, 0.2, backend)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf, fresh in zip(leaves, random_pairs(200, 128, torch.bfloat16, DEVICE), strict=True):
                leaf.copy_(fresh)
        graph.replay()
        assert all(map(torch.equal, captured, _step(loss, leaves, 0.2, backend)))


@pytest.mark.parametrize("loss", LOSSES)
def test_work_goes_to_the_current_stream(backend, leaves, loss):
    """On another stream than its inputs' producer, ordered only by an event: a wrong stream reads too early."""
    expected = _step(loss, leaves, 0.2, backend)
    source = [z.detach().clone() for z in leaves]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds before the inputs are there
        fresh = [z.clone().requires_grad_() for z in source]
        results = _step(loss, fresh, 0.2, backend)
    side.synchronize()
    assert all(map(torch.equal, results, expected))
