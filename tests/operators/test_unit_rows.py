"""Rows of unit length by a backend in one pass: what the plain operations give, which remain where they are needed."""

from __future__ import annotations

import pytest
import torch

from contrastive_ext import numerics
from contrastive_ext.backends import dispatch
from contrastive_ext.operators.unit_rows import operand

BACKENDS = [
    pytest.param(b.name, marks=[pytest.mark.interpreter] if b.name == "triton" else [])
    for b in dispatch.BACKENDS
    if b.unit_rows(torch.float32) is not None
]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = [
    ("float64", None), ("float32", None), ("float16", None), ("bfloat16", None),
    ("float32", "float16"), ("float32", "bfloat16"), ("float16", "float32"),
]  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request):
    found = next(b for b in dispatch.BACKENDS if b.name == request.param)
    reason = found.why_not(torch.device("cpu"), torch.float32, torch.float32, 8)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """With a zero row, a short and a long one."""
    z = torch.randn(shape, dtype=torch.float64).to(dtype)
    flat, finfo = z.view(-1, shape[-1]), torch.finfo(dtype)
    flat[0] = 0.0
    flat[1] *= 4 * finfo.tiny**0.5 / flat[1].abs().amax()
    flat[2] *= finfo.max / 2 / flat[2].abs().amax()
    return z


def _both(z, g, dtype, backend):
    found = []
    for function in (lambda x: operand(x, True, dtype, backend=backend), lambda x: numerics.operand(x, True, dtype)):
        leaf = z.detach().requires_grad_()
        unit = function(leaf)
        (dz,) = torch.autograd.grad(unit, leaf, g)
        found.append((unit.detach(), dz))
    return found


@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (2, 6, 33), (70, 129), (3, 1000)])
@pytest.mark.parametrize("given, rounded", KINDS)
def test_it_is_what_the_plain_operations_give(backend, shape, given, rounded):
    dtype, asked = DTYPES[given], rounded and DTYPES[rounded]
    if backend == "triton" and torch.bfloat16 in (dtype, asked):
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    z = _rows(shape, dtype)
    g = torch.randn(shape, dtype=torch.float64).to(numerics.stats_dtype(asked or dtype))
    (unit, dz), (plain_unit, plain_dz) = _both(z, g, asked, backend)
    assert unit.dtype == plain_unit.dtype and dz.dtype == dtype
    # a number may lie on either side of where it rounds to another one: one step of the dtype it is rounded to
    steps = max(torch.finfo(asked or dtype).eps, 4 * torch.finfo(unit.dtype).eps)
    torch.testing.assert_close(unit, plain_unit, rtol=steps, atol=4 * torch.finfo(unit.dtype).tiny)
    if shape[-1] == 1:
        assert torch.equal(unit, z.sign().to(unit.dtype))
    # dz = (g - u <u, g>)/|z|: rounding of the length of g over the length of the row, and one of the result
    rows, gradients = z.to(torch.float64), g.to(torch.float64)
    length = rows.norm(dim=-1, keepdim=True)
    allowed = 4 * shape[-1] ** 0.5 * torch.finfo(unit.dtype).eps * gradients.norm(dim=-1, keepdim=True) / length
    allowed = allowed + 2 * torch.finfo(dtype).eps * plain_dz.double().abs() + 2 * torch.finfo(dtype).tiny
    error = (dz.double() - plain_dz.double()).abs()
    assert ((error <= allowed) | (dz == plain_dz)).all()
    assert not dz.reshape(-1, shape[-1])[0].any()  # a zero row has a zero gradient


def test_rows_that_are_not_finite_are_nan(backend):
    z = torch.randn(4, 5)
    z[0, 1], z[1, 2], z[2, 3] = torch.inf, -torch.inf, torch.nan
    unit = operand(z, True, backend=backend)
    assert unit[:3].isnan().any(1).all() and unit[3].isfinite().all()
    assert torch.equal(unit.isnan().any(1), numerics.operand(z, True).isnan().any(1))


def test_strides_and_gradients_that_are_expanded(backend):
    z = torch.randn(6, 8).T[::2].requires_grad_()
    operand(z, True, backend=backend).sum().backward()
    other = z.detach().clone().requires_grad_()
    numerics.operand(other, True).sum().backward()
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_gradcheck(backend):
    torch.autograd.gradcheck(
        lambda z: operand(z, True, backend=backend), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    )
    torch.autograd.gradgradcheck(
        lambda z: operand(z, True, backend=backend), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    )


def test_many_gradients_at_once(backend):
    z = torch.randn(4, 3, dtype=torch.float64)
    one_by_one, at_once = (
        torch.autograd.functional.jacobian(lambda z: operand(z, True, backend=backend), z, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-14, atol=1e-15)


def test_transforms_take_plain_operations(backend):
    z = torch.randn(4, 3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: operand(z, True, backend=backend))(z)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda z: numerics.operand(z, True))(z))


def test_autocast_does_not_reach_the_gradient(backend):
    z = torch.randn(6, 8)
    found = []
    for autocast in (False, True):
        leaf = z.clone().requires_grad_()
        unit = operand(leaf, True, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(torch.autograd.grad(unit.square().sum() + unit[0, 0], leaf)[0])
    assert torch.equal(*found)


def test_what_is_used_as_given_stays_as_it_was(backend):
    z = torch.randn(3, 4)
    assert torch.equal(operand(z, False, torch.float16, backend=backend), numerics.operand(z, False, torch.float16))


def test_tensors_without_numbers_take_plain_operations(backend):
    with torch._subclasses.FakeTensorMode():
        unit = operand(torch.randn(6, 8), True, torch.float16, backend=backend)
    assert unit.shape == (6, 8) and unit.dtype == torch.float32
    assert operand(torch.empty(6, 8, device="meta"), True, backend=backend).is_meta
