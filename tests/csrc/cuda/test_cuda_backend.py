"""`row_stats(backend="cuda")` from the public operator down to the kernels, which the interpreter of PTX runs.

What stands in for csrc/cuda/ops.cu takes the same arguments and starts the same sweeps. On a GPU:
test_hopper_forward.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ptx import checks
from ptx.backward import Backward
from ptx.kernels import Forward
from ptx.schedules import Schedule

from contrastive_ext import row_stats
from contrastive_ext.backends import cuda, dispatch
from contrastive_ext.problem.pairs import UNFILLED

pytestmark = pytest.mark.skipif(checks.why_not("backward") is not None, reason=checks.why_not("backward") or "")


def _numbers(x: torch.Tensor | None) -> np.ndarray | None:
    if x is None:
        return None
    assert x.is_contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _call(u, v, scale, scale_value, exponent, num_images, positive_offset, row_ids, col_ids, unit) -> Forward:
    return Forward(
        _numbers(u), _numbers(v), u.dtype == torch.bfloat16, num_images, positive_offset, _numbers(row_ids),
        _numbers(col_ids), exponent, float(scale_value if scale is None else scale), scale is not None, unit,
    )  # fmt: skip


def _forward(*arguments):
    *problem, columns, _stream = arguments
    results, _ = _call(*problem)._replace(columns=columns).run(Schedule())
    nothing = [] if columns else [torch.empty(0), torch.empty(0)]
    return *(torch.from_numpy(x)[None] for x in results), *nothing


def _backward(*arguments):
    problem, (lse, grad, col_lse, col_grad, need_u, need_v, _stream) = arguments[:10], arguments[10:]
    call = _call(*problem)
    rows = grad.numpy()[0], lse.numpy()[0]
    columns = rows if call.v is None else (None, None) if col_lse is None else (col_grad.numpy()[0], col_lse.numpy()[0])
    return tuple(
        torch.from_numpy(Backward(call, *rows, *columns, by_columns).sweep(Schedule())[0]) if needed else torch.empty(0)
        for needed, by_columns in ((need_u, False), (need_v, True))
    )


@pytest.fixture
def on_the_machine(monkeypatch):
    """`cuda` takes calls on the CPU, its operators run in the interpreter."""
    backends = [replace(b, why_not=lambda *_: None) if b.name == cuda.NAME else b for b in dispatch.BACKENDS]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))
    monkeypatch.setattr(torch.ops.contrastive_ext, "row_stats_forward_cuda", _forward, raising=False)
    monkeypatch.setattr(torch.ops.contrastive_ext, "row_stats_backward_cuda", _backward, raising=False)
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


CALLS = {  # rows, columns, features, dtype, options
    "two views with padding": (40, None, 64, torch.bfloat16, {"num_images": 20, "ids": True}),
    "a shard of columns, an exponent": (30, 150, 128, torch.float16, {"num_images": 30, "positive_offset": 70}),
    "a low temperature": (24, None, 256, torch.float16, {"num_images": 12, "scale": 90.0}),
    "pairs, both sides": (40, 40, 64, torch.bfloat16, {"num_images": 40, "columns": True}),
    "ids and padding, both sides": (40, 150, 128, torch.float16, {"num_images": 40, "columns": True, "ids": True}),
    "a low temperature, both sides": (24, 24, 128, torch.float16, {"num_images": 24, "columns": True, "scale": 200.0}),
}


def _ids(count: int, first: int) -> torch.Tensor:
    rows = torch.arange(first, first + count)
    return rows.remainder(9).where(rows % 7 > 0, torch.tensor(UNFILLED))


@pytest.mark.parametrize("name", CALLS)
def test_statistics_and_gradients_are_those_of_the_torch_backend(on_the_machine, name):
    n, m, features, dtype, options = CALLS[name]
    torch.manual_seed(0)
    u, v = (None if k is None else torch.nn.functional.normalize(torch.randn(k, features)) for k in (n, m))
    u, v = (None if x is None else x.to(dtype).float().requires_grad_() for x in (u, v))
    options = {"scale": 14.0, "operand_dtype": dtype, "unit": True, "exponents": (0.5,)} | options
    if options.pop("ids", False):
        options |= {"row_ids": _ids(n, 0)} | ({} if m is None else {"col_ids": _ids(m, 3)})
    scale = torch.tensor(options.pop("scale"), requires_grad=True)
    weights, column_weights = torch.randn(n), torch.randn(n if m is None else m)

    def results(backend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (u, v, scale) if x is not None]
        at = iter(inputs)
        stats = row_stats(next(at), None if v is None else next(at), scale=next(at), backend=backend, **options)
        total = (stats.lse[0] * weights.to(dtype)).sum()
        if stats.col_lse.numel():
            total = total + (stats.col_lse[0] * column_weights.to(dtype)).sum()
        return stats, torch.autograd.grad(total, inputs)

    options["operand_dtype"] = dtype
    ours, gradients = results("cuda", torch.float32)
    options.pop("operand_dtype")
    exact, expected = results("torch", torch.float64)
    for counts, expected_counts in ((ours.aux, exact.aux), (ours.col_aux, exact.col_aux)):
        torch.testing.assert_close(counts.double(), expected_counts, rtol=0, atol=0)
    for lse, expected_lse in ((ours.lse, exact.lse), (ours.col_lse, exact.col_lse)):
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=4 * 2**-23 * (scale.item() + 10))
    # weights are rounded to 16 bits; of rows at random a sum and its error grow with the square root of their number
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for got, truth in zip(gradients, expected, strict=True):
        assert (got.double() - truth).abs().max() <= 4 * rounding * truth.abs().max()


def test_what_is_not_made_names_who_takes_over(on_the_machine):
    with pytest.raises(RuntimeError, match=r"no second exponent yet\. Use backend='triton' or 'auto'"):
        row_stats(torch.eye(8, 64), scale=2.0, exponents=(1.0, 2.0), operand_dtype=torch.float16, backend="cuda")
