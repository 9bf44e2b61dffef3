"""Sums over pairs against their definition: which pairs, both signs, gradients, empty rows, bad numbers, repeats."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_ext import Gate
from contrastive_ext.backends.torch import row_stats as torch_blocks
from contrastive_ext.operators.pair_sums import pair_sums
from contrastive_ext.problem.pairs import UNFILLED, Pairs
from peak_memory import needs_proc, peak_growth

N, M, D = 37, 70, 5
RULES = ("all", "images", "other ids", "equal ids", "padding", "lists", "gate", "everything")


def _rules(name: str, device) -> dict:
    row_ids, col_ids = torch.arange(N) % 6, torch.arange(M) % 4
    lists = torch.randint(-1, M, (N, 3))
    gate = Gate(torch.randn(2, N, 3).double(), torch.randn(M, 3).double(), torch.randn(N).double())
    found = {
        "all": {}, "images": {"num_images": N, "positive_offset": 9},
        "other ids": {"row_ids": row_ids, "col_ids": col_ids},
        "equal ids": {"row_ids": row_ids, "col_ids": col_ids, "only_equal_ids": True, "num_images": N},
        "padding": {"col_ids": torch.where(torch.arange(M) % 3 == 1, UNFILLED, 7)},
        "lists": {"ignored": lists}, "gate": {"gate": gate},
        "everything": {"num_images": N, "row_ids": row_ids, "col_ids": col_ids, "ignored": lists, "gate": gate},
    }[name]  # fmt: skip
    moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in found.items()}
    if "gate" in moved:
        moved["gate"] = Gate(*(x.to(device) for x in (gate.scorers, gate.features, gate.row_limit)))
    return moved


def _inputs(device, dtype=torch.float64) -> tuple:
    torch.manual_seed(0)
    u, v, offset = torch.randn(N, D), torch.randn(M, D), torch.randn(N)
    return tuple(x.to(device, dtype).requires_grad_() for x in (u, v, offset))


def _expected(u, v, offset, scale, sign, rules) -> tuple:
    chosen = Pairs(N, M, device=u.device, **rules).keep(slice(0, N), slice(0, M))
    chosen = torch.ones(N, M, dtype=torch.bool, device=u.device) if chosen is None else chosen
    x = sign * scale * u @ v.T + offset[:, None]
    terms = torch.logaddexp(x, torch.zeros_like(x)).where(chosen, 0.0)
    return terms.sum(1), x.sigmoid().where(chosen, 0.0).sum(1), chosen.sum(1).to(u.dtype)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rule", RULES)
def test_sums_and_gradients_are_the_definition(run, rule, sign, monkeypatch):
    backend, device = run
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 16)  # several tiles
    rules, leaves = _rules(rule, device), _inputs(device)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    found = pair_sums(*leaves[:2], scale=scale, offset=leaves[2], sign=sign, backend=backend, **rules)
    expected = _expected(*leaves, scale, sign, rules)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(N, dtype=torch.float64, device=device)
    gradients = [torch.autograd.grad(x[0], (*leaves, scale), upstream) for x in (found, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_gradcheck(run):
    backend, device = run
    rules = {name: x[:9] for name, x in _rules("other ids", device).items()}

    def total(u, v, offset, scale):
        return pair_sums(u, v, scale=scale, offset=offset, sign=-1, backend=backend, **rules).sum

    few = [x.detach()[:9].clone().requires_grad_() for x in _inputs(device)]
    scale = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(total, (*few, scale), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
def test_float32_is_as_exact_as_its_logits(run, scale):
    """Of many small terms none is lost: the error is that of the logits, eps times the largest, in every term."""
    backend, device = run
    u, v, offset = (x.detach() for x in _inputs(device, torch.float32))
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (u, v))
    truth = _expected(u.double(), v.double(), (offset - 10).double(), scale, 1, {})
    found = pair_sums(u, v, scale=scale, offset=offset - 10, backend=backend)
    logit = scale + 14
    tolerance = 4 * logit * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.sum.double(), truth[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(found.slope.double(), truth[1], rtol=tolerance, atol=0)


def test_nothing_and_infinite_offsets(run):
    backend, device = run
    u, v, offset = (x.detach() for x in _inputs(device))
    assert not any(x.any() for x in pair_sums(u, v[:0], scale=1.0, offset=offset, backend=backend))
    assert pair_sums(u[:0], v, scale=1.0, offset=offset[:0], backend=backend).sum.shape == (0,)
    never = pair_sums(u, v, scale=1.0, offset=torch.full_like(offset, -math.inf), backend=backend)
    assert not never.sum.any() and not never.slope.any()
    always = pair_sums(u, v, scale=1.0, offset=torch.full_like(offset, math.inf), backend=backend)
    assert (always.sum == math.inf).all() and (always.slope == M).all()


def test_bad_numbers_reach_the_rows_that_meet_them(run):
    backend, device = run
    u, v, offset = (x.detach().clone() for x in _inputs(device))
    v[3], u[5], offset[7] = torch.nan, torch.nan, torch.nan
    rules = {"row_ids": torch.zeros(N, dtype=torch.int64), "col_ids": torch.arange(M) - 3}  # column 3 is nobody's
    found = pair_sums(u, v, scale=1.0, offset=offset, backend=backend, **{k: x.to(device) for k, x in rules.items()})
    assert found.sum.isnan().nonzero().flatten().tolist() == [5, 7]
    assert pair_sums(u, v, scale=1.0, offset=offset, backend=backend).sum.isnan().all()


def test_repeats_bit_for_bit(run):
    backend, device = run
    results = []
    for _ in range(2):
        leaves = _inputs(device, torch.float32)
        found = pair_sums(*leaves[:2], scale=5.0, offset=leaves[2], backend=backend)
        results.append([*found, *torch.autograd.grad(found.sum.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivatives_are_refused(run):
    backend, device = run
    u, v, offset = _inputs(device)
    found = pair_sums(u, v, scale=1.0, offset=offset, backend=backend)
    (du,) = torch.autograd.grad(found.sum.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(du.sum(), u)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"sign": 2}, ValueError, "sign must be 1 or -1"),
        ({"offset": torch.zeros(3)}, ValueError, r"offset must be torch.float64 \[37\]"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"only_equal_ids": True}, ValueError, "compares ids"),
        ({"operand_dtype": torch.int8}, TypeError, "operand_dtype must be"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    u, v, offset = _inputs("cpu")
    with pytest.raises(error, match=says):
        pair_sums(u, v, **{"scale": 1.0, "offset": offset, **arguments})


@needs_proc
def test_memory_is_linear():
    setup = (
        "from contrastive_ext.operators.pair_sums import pair_sums; "
        "u, v = (torch.randn(n, 64).requires_grad_() for _ in range(2)); offset = torch.zeros(n)"
    )
    n = 8192
    growth = peak_growth(setup, "pair_sums(u, v, scale=1.0, offset=offset).sum.sum().backward()", small=16, large=n)
    assert 0 < growth <= 48 * 2**20, f"{growth / 2**20:.0f} MiB; one matrix is {n * n * 4 / 2**20:.0f} MiB"
