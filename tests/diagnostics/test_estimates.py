"""estimate_memory against what is measured: on the CPU, on a GPU if there is one, on an H200 by the results file."""

from __future__ import annotations

import ast
import json
import re

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.backends import native
from contrastive_ext.diagnostics.memory import mebibytes
from peak_memory import needs_proc, peak_growths
from repository import ROOT

FACTOR = 1.5
NOISE = 2**18  # resident pages come and go with what else a first call at a size touches
DIM = 128
SIZES = (512, 1024, 2048, 4096, 8192)  # N = 2B of two views
DENSE_SIZES = (512, 1024, 2048, 3072, 4096)
SETUP = f"z1, z2 = (torch.randn(n // 2, {DIM}).requires_grad_() for _ in range(2))"
# What estimate_memory calls dense, as bench/baselines.py has it.
EAGER = """
def loss():
    z = torch.nn.functional.normalize(torch.cat([z1, z2]))
    logits = z @ z.T / 0.5
    index = torch.arange(len(z))
    partner = (index + len(z1)) % len(z)
    pos = logits.gather(1, partner[:, None])[:, 0]
    ignored = torch.zeros_like(logits, dtype=torch.bool)
    ignored[index, index] = ignored[index, partner] = True
    lse = logits.masked_fill(ignored, -torch.inf).logsumexp(1)
    return torch.logaddexp(lse - pos, torch.zeros_like(pos)).mean()
loss().backward()
"""
RESULTS = ROOT / "bench" / "results" / "nvidia-h200.json"


def assert_close(estimated: int, measured: float, what: object) -> None:
    low, high = (measured - NOISE) / FACTOR, (measured + NOISE) * FACTOR
    assert low <= estimated <= high, f"{what}: estimated {estimated / 2**20:.2f} MiB, measured {measured / 2**20:.2f}"


@needs_proc
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_estimate_is_what_a_backend_takes_on_the_cpu(backend, monkeypatch):
    if backend not in ce.available_backends():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # as in the measurement
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = DENSE_SIZES if backend == "reference" else SIZES
    growths = peak_growths(SETUP, f"ce.fused_infonce_loss(z1, z2, 0.5, backend={backend!r}).backward()", 64, *sizes)
    for n, growth in zip(sizes, growths, strict=True):
        estimate = ce.estimate_memory(n // 2, DIM, backend=backend)
        assert estimate.backend == backend
        assert_close(estimate.fused, growth, f"{backend}, N = {n}")


@needs_proc
def test_estimate_of_the_dense_loss_is_what_it_takes():
    for n, growth in zip(DENSE_SIZES, peak_growths(SETUP, EAGER, 64, *DENSE_SIZES), strict=True):
        assert_close(ce.estimate_memory(n // 2, DIM, backend="reference").dense, growth, f"dense, N = {n}")


@needs_proc
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "batch, dim, options",
    [
        (1024, DIM, {"layout": "symmetric"}),
        (2048, DIM, {"layout": "symmetric"}),
        (4096, DIM, {"layout": "symmetric"}),
        (1024, DIM, {"layout": "one_way", "queue": 16384}),
        (4096, DIM, {"layout": "one_way", "queue": 8192}),
        (2048, DIM, {"dtype": torch.bfloat16}),
        (1024, DIM, {"dtype": torch.bfloat16, "layout": "one_way", "queue": 16384}),
        (1024, 1024, {}),
    ],
    ids=["symmetric", "symmetric, one block", "large symmetric", "queue", "short queue", "bf16", "bf16 queue", "wide"],
)
def test_estimate_knows_layouts_queues_dtypes_and_features(backend, batch, dim, options, monkeypatch):
    if backend not in ce.available_backends():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layout, queue = options.get("layout", "two_view"), options.get("queue", 0)
    dtype = options.get("dtype", torch.float32)
    setup = f"""
z1, z2 = (torch.randn(n, {dim}).to({dtype}).requires_grad_() for _ in range(2))
queue = torch.nn.functional.normalize(torch.randn({queue}, {dim}), dim=1).to({dtype}) if {queue} else None
"""
    call = f"ce.fused_infonce_loss(z1, z2, 0.5, layout={layout!r}, queue=queue, backend={backend!r}).backward()"
    (growth,) = peak_growths(setup, call, 32, batch)
    estimate = ce.estimate_memory(batch, dim, layout=layout, queue_size=queue, dtype=dtype, backend=backend)
    assert_close(estimate.fused, growth, backend)


@needs_proc
@pytest.mark.parametrize("batch", [1024, 2048])
def test_estimate_knows_the_layouts_of_amx(batch, monkeypatch):
    """By the model of its instructions, which reads the same."""
    if "cpu" not in ce.available_backends():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "build_info", lambda: {"cpu_bf16": "model"})
    bf16 = SETUP.replace(".requires_grad_()", ".bfloat16().requires_grad_()")
    model = "ce.available_backends(); torch.ops.contrastive_ext.use_bf16_products_cpu('model')\n"
    call = "ce.fused_infonce_loss(z1, z2, 0.5, backend='cpu').backward()"
    (growth,) = peak_growths(model + bf16, call, 64, 2 * batch)
    assert_close(ce.estimate_memory(batch, DIM, dtype=torch.bfloat16, backend="cpu").fused, growth, "model")


def _of_an_h200() -> list:
    rows = json.loads(RESULTS.read_text())["rows"]
    kept = [r for r in rows if r["loss"] == "fused_infonce_loss" and r["backend"] in ("triton", "cuda", "eager")]
    return [
        pytest.param(r, id="-".join(str(r[x]) for x in ("backend", "layout", "N", "D", "dtype")))
        for r in kept
        if r["status"] == "ok" and r["peak_extra_mib"]
    ]


@pytest.mark.parametrize("row", _of_an_h200())
def test_estimate_is_what_an_h200_has_measured(row):
    dtype = torch.float32 if row["dtype"] == "tf32" else getattr(torch, row["dtype"])
    queue = row["M"] if row["layout"] == "queue" else 0
    layout = "one_way" if queue else row["layout"]
    batch = row["N"] // 2 if layout == "two_view" else row["N"]
    backend = "triton" if row["backend"] == "eager" else row["backend"]
    estimate = ce.estimate_memory(batch, row["D"], layout=layout, queue_size=queue, dtype=dtype, backend=backend)
    estimated = estimate.dense if row["backend"] == "eager" else estimate.fused
    assert_close(estimated, row["peak_extra_mib"] * 2**20, row["backend"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_estimate_is_what_a_backend_takes_on_the_gpu(backend):
    for n in SIZES:
        z1, z2 = (torch.randn(n // 2, DIM, device="cuda", requires_grad=True) for _ in range(2))
        ce.fused_infonce_loss(z1[:8], z2[:8], backend=backend).backward()
        z1.grad = z2.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ce.fused_infonce_loss(z1, z2, backend=backend).backward()
        growth = torch.cuda.max_memory_allocated() - before
        assert_close(ce.estimate_memory(n // 2, DIM, backend=backend).fused, growth, f"{backend}, N = {n}")


def test_a_small_batch_is_not_told_that_it_needs_more_than_the_dense_loss():
    for batch in (32, 128, 256):
        estimate = ce.estimate_memory(batch, DIM, backend="cpu")
        assert estimate.fused < 2**21 and estimate.fused < estimate.dense
    assert "times less" in str(estimate) and "'cpu'" in str(estimate)
    assert "times more" in str(ce.estimate_memory(256, DIM, backend="reference"))


def test_auto_is_what_a_call_here_would_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    taken = ce.explain(torch.ones(2, 8)).chosen
    assert ce.estimate_memory(8, 8) == ce.estimate_memory(8, 8, backend=taken)
    with pytest.raises(ValueError, match="backend must be one of"):
        ce.estimate_memory(8, 8, backend="gpu")


def test_estimates_that_the_documents_name_are_those_of_today(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = (ROOT / "docs" / "large_batches.md").read_text()
    named = re.findall(r"estimate_memory\((\d+), (\d+), (.*)\)  # .*: ([\d,]+) MiB", page)
    assert len(named) == 2
    for batch, dim, options, mib in named:
        quoted = re.sub(r"(\w+)=", r"'\1':", options)
        keywords = ast.literal_eval("{" + quoted + "}")
        estimate = ce.estimate_memory(int(batch), int(dim), backend="cpu", **keywords)
        assert mebibytes(estimate.fused) == mib


@needs_proc
def test_estimate_knows_the_layouts_of_three_parts(monkeypatch):
    """float32 operands on AMX, by its model: three layouts of three parts."""
    if "cpu" not in ce.available_backends():
        pytest.skip("the native library is not built")
    batch = 512  # the model is slow
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "build_info", lambda: {"cpu_bf16": "model"})
    model = "ce.available_backends(); torch.ops.contrastive_ext.use_bf16_products_cpu('model')\n"
    call = "ce.fused_infonce_loss(z1, z2, 0.5, backend='cpu', operand_dtype='bf16x3').backward()"
    (growth,) = peak_growths(model + SETUP, call, 64, 2 * batch)
    estimate = ce.estimate_memory(batch, DIM, operand_dtype="bf16x3", backend="cpu").fused
    assert_close(estimate, growth, "three parts")
    assert estimate > ce.estimate_memory(batch, DIM, backend="cpu").fused
