"""Sums over pairs by the Triton kernels: the arithmetic of a pair, tiles, chunks, splits, stored weights, 16 bits.

Runs in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; tests/operators/test_pair_sums.py has the definition.
"""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_close
from contrastive_ext import Gate
from contrastive_ext.backends.triton import launch, row_stats
from contrastive_ext.operators.pair_sums import pair_sums
from contrastive_ext.problem.pairs import NO_COLUMN, UNFILLED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = row_stats.why_not(DEVICE, torch.float32, torch.float32, 8)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    *([pytest.mark.interpreter] if DEVICE.type == "cpu" else []),
]


@pytest.fixture(autouse=True)
def _small_device(monkeypatch):
    """As few processors as the interpreter has: with those of a GPU small problems have no splits."""
    monkeypatch.setattr(launch, "processors", lambda device: launch.INTERPRETED_PROCESSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_and_its_slope_have_all_their_digits(dtype):
    """In ulps of the result: a sum of one pair, whose logit is its offset."""
    offset = torch.cat([torch.linspace(-80, 80, 400), torch.linspace(-1, 1, 400)]).to(DEVICE, dtype)
    nothing = torch.zeros(len(offset), 1, dtype=dtype, device=DEVICE)
    found = pair_sums(nothing, nothing[:1], scale=1.0, offset=offset, backend="triton")
    x = offset.double()
    # e^x has as many ulps as x is large: two roundings on the way from nats to log2, one in the power
    ulps = (6 + 2 * x.abs()) * torch.finfo(dtype).eps
    for got, truth in ((found.sum, torch.logaddexp(x, x.new_zeros(()))), (found.slope, x.sigmoid())):
        assert ((got.double() - truth).abs() <= ulps * truth).all()


def _gate() -> Gate:
    guides = torch.randn(2, 20, 40, dtype=torch.float64, device=DEVICE)
    features = torch.randn(130, 40, dtype=torch.float64, device=DEVICE)
    return Gate(guides, features, torch.randn(40, dtype=torch.float64, device=DEVICE))


def _lists() -> torch.Tensor:
    lists = torch.stack([torch.randperm(130)[:50] for _ in range(20)])
    lists[1::2] = NO_COLUMN
    return lists.to(DEVICE)


def _ids() -> dict:
    columns = torch.where(torch.arange(130) % 5 == 0, UNFILLED, torch.arange(130) % 3)
    return {"row_ids": (torch.arange(40) % 3).to(DEVICE), "col_ids": columns.to(DEVICE)}


# name, features, what else is passed, why it is there
PROBLEMS = [
    ("images", 20, lambda: {"num_images": 40, "positive_offset": 70}, "images inside a range that no tile starts at"),
    ("wide", 300, lambda: {"num_images": 8}, "more features than a program holds: chunks, stored weights"),
    ("ids", 20, lambda: {**_ids(), "num_images": 40}, "masks for every tile, columns counted"),
    ("equal_ids", 300, lambda: {**_ids(), "only_equal_ids": True}, "few pairs left, padding"),
    ("lists", 20, lambda: {"ignored": _lists()}, "cursors of rows, and of columns for their gradient"),
    ("gate", 20, lambda: {"gate": _gate()}, "scorers change sides for the columns"),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p[0] for p in PROBLEMS])
def test_across_tiles(problem, sign, monkeypatch):
    _, features, rules, _ = problem
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)  # stored weights in several launches
    rules = rules()
    u, v = (torch.randn(n, features, dtype=torch.float64, device=DEVICE) / features**0.5 for n in (40, 130))
    offset, upstream = (torch.randn(40, dtype=torch.float64, device=DEVICE) for _ in "ab")
    leaves = [x.requires_grad_() for x in (u, v, offset, torch.tensor(4.0, dtype=torch.float64, device=DEVICE))]
    results = []
    for name in ("triton", "torch"):
        found = pair_sums(*leaves[:2], offset=leaves[2], scale=leaves[3], sign=sign, backend=name, **rules)
        results.append([*found, *torch.autograd.grad(found.sum, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", ["u", "v", "scale", "offset"])
def test_each_gradient_alone(wanted):
    inputs = {"u": torch.randn(35, 20), "v": torch.randn(50, 20), "scale": torch.tensor(2.0), "offset": torch.randn(35)}
    inputs = {name: x.to(DEVICE, torch.float64).requires_grad_(name == wanted) for name, x in inputs.items()}
    found = [torch.autograd.grad(pair_sums(**inputs, backend=b).sum.sum(), inputs[wanted]) for b in ("triton", "torch")]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2.0**-20, 2.0**16])
@pytest.mark.parametrize("features", [20, 300])
@pytest.mark.parametrize("operands", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_that_of_the_dense_formula(operands, features, size):
    """The rule of tests/accuracy.py, in the dtype of the operands, for small upstream gradients and a GradScaler's."""
    scale, bias = 12.0, -6.0
    u, v = (torch.nn.functional.normalize(torch.randn(n, features, device=DEVICE)) for n in (40, 70))
    u, v = (x.to(operands) for x in (u, v))
    upstream = size * torch.linspace(0.5, 1.5, 40, device=DEVICE)

    def dense(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (u, v)]
        x = scale * leaves[0] @ leaves[1].T + bias
        total = torch.logaddexp(x, torch.zeros_like(x)).sum(1)
        return [total.detach(), *torch.autograd.grad(total, leaves, upstream.to(dtype))]

    leaves = [x.float().requires_grad_() for x in (u, v)]
    offset = torch.full((40,), bias, device=DEVICE)
    found = pair_sums(*leaves, scale=scale, offset=offset, operand_dtype=operands, backend="triton").sum
    ours = [found.detach(), *torch.autograd.grad(found, leaves, upstream)]
    # fp16 and bf16 products of rows and of weights are rounded where the dense formula's are
    for name, got, rough, truth in zip(("sum", "du", "dv"), ours, dense(operands), dense(torch.float64), strict=True):
        assert_close(name, got, rough, truth, scale - bias, 0.0, torch.float32 if name == "sum" else operands, size)


def test_rows_of_any_strides_and_starts():
    wide = torch.randn(41, 2, 25, device=DEVICE, dtype=torch.float64)
    u, v, offset = wide[1:, 0, 3:], wide[:, 1, 1:23], torch.randn(40, 2, device=DEVICE, dtype=torch.float64)[:, 1]
    found = pair_sums(u, v, scale=1.0, offset=offset, backend="triton")
    dense = torch.logaddexp(u @ v.T + offset[:, None], u.new_zeros(()))
    torch.testing.assert_close(found.sum, dense.sum(1), rtol=1e-12, atol=0)


def test_products_of_split_operands():
    u, v = (torch.randn(n, 20, device=DEVICE).requires_grad_() for n in (40, 70))
    offset = torch.randn(40, device=DEVICE)
    results = []
    for dtype, operands in ((torch.float32, "fp16x3"), (torch.float64, None)):
        leaves, backend = [x.detach().to(dtype).requires_grad_() for x in (u, v)], "triton" if operands else "torch"
        found = pair_sums(
            *leaves, scale=2.0, offset=offset.to(dtype), sign=-1, operand_dtype=operands, backend=backend
        ).sum
        results.append([found, *torch.autograd.grad(found.sum(), leaves)])
    for got, truth in zip(*results, strict=True):
        assert (got.double() - truth).norm() <= 2e-6 * truth.norm()
