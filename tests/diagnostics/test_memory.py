"""Memory grows with N, not with N^2: peak growth of the process, measured in a process of its own."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from peak_memory import needs_proc, peak_growth


def _peak_growth(call: str, n: int, dim: int) -> int:
    setup = f"z1, z2 = (torch.randn(n // 2, {dim}).requires_grad_() for _ in range(2))"
    return peak_growth(setup, call, small=16, large=n)


@needs_proc
@pytest.mark.parametrize(
    "function, n",
    # at 8192 too the matrix alone, 256 MiB, is over the limit
    [("fused_infonce_loss", 16384), ("fused_hard_negative_loss", 8192), ("fused_bayesian_loss", 8192)],
)
def test_memory_is_linear_in_the_batch(run, function, n):
    backend, device = run
    if device.type != "cpu":
        pytest.skip("measured through the allocator by test_peak_on_the_gpu")
    dim = 128
    growth = _peak_growth(f"ce.{function}(z1, z2, 0.5, backend={backend!r}).backward()", n, dim)
    assert growth > 0
    limit = 100 if backend == "cpu" else 150
    assert growth <= limit * 2**20, f"{growth / 2**20:.0f} MiB; the matrix alone is {n * n * 4 / 2**20:.0f} MiB"


@needs_proc
@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("criteria", ["", ", top_k=None, threshold=-1.0"], ids=["lists", "everything detected"])
def test_memory_of_detected_false_negatives_is_linear(run, criteria, mode):
    backend, device = run
    if device.type != "cpu":
        pytest.skip("measured on the CPU")
    n = 8192
    setup = "views = torch.randn(2, n // 2, 128).requires_grad_()"
    call = f"ce.fused_false_negative_loss(views, mode={mode!r}, backend={backend!r}{criteria}).backward()"
    growth = peak_growth(setup, call, small=16, large=n)
    assert growth <= 150 * 2**20, f"{growth / 2**20:.0f} MiB; the matrix alone is {n * n * 4 / 2**20:.0f} MiB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", [ce.fused_infonce_loss, ce.fused_hard_negative_loss])
def test_peak_on_the_gpu(run, function):
    backend, device = run
    if device.type != "cuda":
        pytest.skip("the CPU is measured by test_memory_is_linear_in_the_batch")
    z1, z2 = (torch.randn(8192, 128, device=device, requires_grad=True) for _ in range(2))
    function(z1[:8], z2[:8], backend=backend).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(z1, z2, backend=backend).backward()
    assert torch.cuda.max_memory_allocated() - before <= 450 * 2**20  # the matrix alone is 1024 MiB


def test_estimate_counts_layout_and_queue():
    two_view, one_way = ce.estimate_memory(8192, 64), ce.estimate_memory(8192, 64, layout="one_way")
    assert two_view.dense == pytest.approx(4 * one_way.dense, rel=0.05)  # the matrix, and a little as long as the batch
    assert ce.estimate_memory(256, 64, layout="one_way", queue_size=65536).dense > 256 * one_way.dense / 8192
    assert ce.estimate_memory(8192, 64, world_size=8).dense == pytest.approx(8 * two_view.dense, rel=0.05)
    assert ce.estimate_memory(32768, 128).ratio > 100
    assert "times less" in str(two_view)
    with pytest.raises(ValueError, match="batch_size"):
        ce.estimate_memory(0, 64)
    with pytest.raises(ValueError, match="layout"):
        ce.estimate_memory(8, 64, layout="three_view")
