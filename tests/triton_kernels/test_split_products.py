"""Products of float32 operands in two fp16 parts, `operand_dtype="fp16x3"`: as exact as float32.

Runs in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU.
"""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext import row_stats
from contrastive_ext.backends.triton import launch as triton_launch
from contrastive_ext.backends.triton import row_stats as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backend.why_not(DEVICE, torch.float32, torch.float32, 8)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    *([pytest.mark.interpreter] if DEVICE.type == "cpu" else []),
]


@pytest.fixture(autouse=True)
def _small_device(monkeypatch):
    """As few processors as the interpreter has: with those of a GPU small problems have no triangle and no splits."""
    monkeypatch.setattr(triton_launch, "processors", lambda device: triton_launch.INTERPRETED_PROCESSORS)


def _vectors(rows: int, features: int, dtype=torch.float64) -> torch.Tensor:
    x = torch.nn.functional.normalize(torch.randn(rows, features, dtype=torch.float64))
    return x.to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("size", [None, 2.0**20, 2.0**-20], ids=["unit", "large", "small"])
@pytest.mark.parametrize("usage", ["one_set", "two_sets", "frozen", "two_exponents"])
@pytest.mark.parametrize("features", [20, 64])
def test_products_of_split_operands_are_as_exact_as_float32_on_a_gpu_too(features, usage, size):
    """Against float64: at most twice the error of the same in float32, plus ulps of the largest number."""
    exact_u, exact_v = _vectors(70, features), _vectors(90, features)
    if size is not None and usage == "two_exponents":
        size = max(size, 2.0**-5)  # their exponents times the scale are limited
    factor, scale = (1.0, 20.0) if size is None else (size, 20.0 / size**2)
    exact = [(x.detach().float() * factor).double().requires_grad_(usage != "frozen" or x is exact_u)
             for x in (exact_u, exact_v)]  # fmt: skip
    arguments = {"scale": scale, "unit": size is None, "exponents": (0.5, 1.5) if usage == "two_exponents" else (1.0,)}
    if usage == "one_set":
        exact, arguments["num_images"] = exact[:1], 35
    else:
        arguments["columns"] = usage != "frozen"
    truth, dense, ours = (
        _lse_and_gradients([x.detach().to(dtype).requires_grad_(x.requires_grad) for x in exact], arguments | how)
        for dtype, how in (
            (torch.float64, {"backend": "torch"}),
            (torch.float32, {"backend": "torch"}),
            (torch.float32, {"backend": "triton", "operand_dtype": "fp16x3"}),
        )
    )
    for right, plain, mine in zip(truth, dense, ours, strict=True):
        ulps = 8 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= 2 * (plain.double() - right).abs().max() + ulps


def _lse_and_gradients(leaves, arguments):
    swept = row_stats(*leaves, **arguments)
    values = [x for x in (swept.lse, swept.col_lse) if x.numel()]
    wanted = [x for x in leaves if x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in values]
    return [*(x.detach() for x in values), *torch.autograd.grad(values, wanted, upstream)]


def test_bad_numbers_of_split_operands_stay_in_their_row():
    u = _vectors(40, 20, torch.float32).detach()
    u[7, 3] = float("inf")
    lse = row_stats(u, _vectors(50, 20, torch.float32), scale=3.0, backend="triton", operand_dtype="fp16x3").lse[0]
    assert not lse[7].isfinite() and lse[torch.arange(40, device=DEVICE) != 7].isfinite().all()


def test_split_operands_end_where_rows_no_longer_stay_in_a_program():
    z = torch.randn(4, 300, device=DEVICE)
    with pytest.raises(RuntimeError, match="'fp16x3' products end at 256 features; these rows have 300"):
        ce.fused_infonce_loss(z, z, backend="triton", operand_dtype="fp16x3")


def test_ranks_of_split_operands_are_those_of_float32():
    """A histogram is asked four times for the bin of a pair: its sweeps stay in float32, of any number of features."""
    z1, z2 = (_vectors(30, 21, torch.float32).detach().requires_grad_() for _ in "12")
    results = []
    for how in ({}, {"operand_dtype": "fp16x3"}):
        loss = ce.fused_bayesian_loss(z1, z2, 0.1, ranks="histogram", backend="triton", **how)
        results.append((loss.detach(), *torch.autograd.grad(loss, (z1, z2))))
    for plain, split in zip(*results, strict=True):
        torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-7)
