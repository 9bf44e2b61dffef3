"""The streaming primitive on its own: statistics and gradients against the dense definition, operator hygiene."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from contrastive_ext import row_stats
from contrastive_ext.backends.torch import row_stats as torch_blocks
from contrastive_ext.operators.ranked_stats import ranked_stats
from contrastive_ext.operators.top_columns import top_columns
from contrastive_ext.problem.pairs import NO_COLUMN_ID, Gate
from contrastive_ext.problem.ranking import Ranking
from problems import IDS, PROBLEMS, check_definition, lse_of, make_problem, negatives

OP = torch.ops.contrastive_ext.row_stats


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_statistics_and_gradients_match_the_definition(run, problem, unit):
    check_definition(run, problem, unit)


@pytest.mark.parametrize("needs", ["u", "v", "scale", "u v", "u scale", "v scale"])
@pytest.mark.parametrize(
    "problem",
    [p for p in PROBLEMS if p[0] in ("one_way", "clip", "ids_two_sets", "lists_two_sets", "gate_scorers")],
    ids=lambda p: p[0],
)
def test_only_what_needs_a_gradient_gets_one(run, problem, needs):
    backend, device = run
    u, v, scale, options = make_problem(problem, device)
    named = {"u": u, "v": v, "scale": scale}
    everything = [x.clone().requires_grad_() for x in named.values()]
    row_stats(*everything[:2], scale=everything[2], unit=True, backend=backend, **options).lse.sum().backward()
    for name, x in named.items():
        x.requires_grad_(name in needs.split())
    row_stats(u, v, scale=scale, unit=True, backend=backend, **options).lse.sum().backward()
    for (name, x), full in zip(named.items(), everything, strict=True):
        if name in needs.split():
            torch.testing.assert_close(x.grad, full.grad, rtol=1e-12, atol=1e-13)
        else:
            assert x.grad is None


def test_frozen_columns_may_change_before_the_backward(run):
    """A queue is overwritten in place between forward and backward; its gradient was made in the forward."""
    backend, device = run
    u = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    queue = torch.randn(8, 4, dtype=torch.float64, device=device)
    ids = torch.full((8,), NO_COLUMN_ID, device=device)
    expected = torch.autograd.grad((u @ queue.T).logsumexp(1).sum(), u)[0]
    swept = row_stats(u, queue, col_ids=ids, scale=1.0, backend=backend)
    queue.zero_(), ids.zero_()
    torch.testing.assert_close(torch.autograd.grad(swept.lse.sum(), u)[0], expected)


def _pair_arguments(options: dict) -> list:
    gate = options.get("gate")
    tensors = [options.get(name) for name in ("row_ids", "col_ids", "ignored")]
    tensors += [None] * 4 if gate is None else [gate.scorers, gate.features, gate.row_limit, gate.col_limit]
    numbers = [options.get("num_images", 0), options.get("positive_offset", 0), options.get("only_equal_ids", False)]
    return numbers + tensors


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_operator_passes_opcheck(run, problem):
    backend, device = run
    u, v, scale, options = make_problem(problem, device)
    arguments = (
        u.requires_grad_(), v, scale.requires_grad_(), 0.0, list(options.get("exponents", (1.0,))),
        *_pair_arguments(options), True, u.dtype, "", backend, options.get("columns", False), False, True, False,
    )  # fmt: skip
    opcheck(OP, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", ["one_set", "clip", "queue", "ids", "lists", "gate"])
def test_operator_is_traceable_with_dynamic_shapes(run, name):
    backend, device = run
    problem = next(p for p in PROBLEMS if p[0] == name)
    u, v, scale, options = make_problem(problem, device)
    v = v if v is None or name == "queue" else v.requires_grad_()
    arguments = (
        u.requires_grad_(), v, scale.requires_grad_(), 0.0, [1.0], *_pair_arguments(options),
        True, u.dtype, "", backend, options.get("columns", False), name == "queue", False, False,
    )  # fmt: skip
    opcheck(OP, arguments, test_utils="test_aot_dispatch_dynamic")


def test_second_derivative_raises(run):
    backend, device = run
    u = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    lse = row_stats(u, scale=2.0, num_images=3, backend=backend).lse
    (grad,) = torch.autograd.grad(lse.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_second_derivative_through_frozen_columns_raises(run):
    backend, device = run
    u = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    lse = row_stats(u, torch.randn(5, 4, dtype=torch.float64, device=device), scale=2.0, backend=backend).lse
    (grad,) = torch.autograd.grad(lse.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_reruns_are_bitwise_equal(run, problem):
    backend, device = run
    u, v, scale, options = make_problem(problem, device, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (u, v) if x is not None]

    def once():
        lse = row_stats(u, v, scale=scale, unit=True, backend=backend, **options).lse
        return [lse, *torch.autograd.grad(lse.where(lse.isfinite(), 0.0).sum(), leaves)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_strided_inputs(run, problem):
    backend, device = run
    u, v, scale, options = make_problem(problem, device)
    spread = [None if x is None else torch.stack([x, x + 1], -1)[..., 0].T.contiguous().T for x in (u, v)]
    assert not spread[0].is_contiguous()
    for x in (u, v, *spread):
        if x is not None:
            x.requires_grad_()
    plain = row_stats(u, v, scale=scale, backend=backend, **options).lse
    strided = row_stats(*spread, scale=scale, backend=backend, **options).lse
    assert torch.equal(plain, strided)
    upstream = torch.rand_like(plain.T).T  # an upstream gradient with strides of its own
    for a, b in ((u, spread[0]), (v, spread[1])):
        if a is not None:
            ours = [torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y, x in ((plain, a), (strided, b))]
            assert torch.equal(*ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_one_number_has_any_strides(run, dtype):
    """[1, 1] is contiguous whatever its strides are, and no kernel may mind them."""
    backend, device = run
    u = torch.tensor([[0.5, 7.0], [7.0, 7.0]], dtype=dtype, device=device)[:1, :1].as_strided((1, 1), (4, 2))
    v = (2 * u).as_strided((1, 1), (4, 2))
    assert u.is_contiguous() and u.stride() == v.stride() == (4, 2)
    leaves = u.requires_grad_(), v.requires_grad_()
    lse = row_stats(u, v, scale=3.0, backend=backend).lse
    torch.testing.assert_close(lse, torch.full_like(lse, 1.5))
    du, dv = torch.autograd.grad(lse.sum(), leaves)
    torch.testing.assert_close((du.item(), dv.item()), (3.0, 1.5))
    best = top_columns(u.detach()[None], v.detach(), 1, backend=backend)
    assert best.scores.item() == 0.5 and best.columns.item() == 0


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_tile_edges_do_not_matter(problem, monkeypatch):
    """Tiles of 4 put edges, corners and mixed masks everywhere a single tile has none."""
    u, v, scale, options = make_problem(problem, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (u, v, scale) if x is not None]

    def once():
        swept = row_stats(u, v, scale=scale, diagnostics=True, backend="torch", **options)
        parts = [swept.lse, swept.col_lse]
        total = sum(
            (p.where(p.isfinite(), 0.0) * torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape)).sum() for p in parts
        )
        return [*swept, *torch.autograd.grad(total, leaves)]

    whole = once()
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 4)
    for a, b in zip(whole, once(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale_type", ["float", "tensor"])
def test_extreme_logits_stay_finite(run, scale_type):
    backend, device = run
    u = torch.nn.functional.normalize(torch.randn(30, 5, device=device)).requires_grad_()
    for scale in (1e-2, 2e2, 5e3):
        given = scale if scale_type == "float" else torch.tensor(scale, device=device)
        swept = row_stats(u, scale=given, num_images=15, unit=True, exponents=(1.0, 2.0), backend=backend)
        (grad,) = torch.autograd.grad(swept.lse.sum(), u)
        assert swept.lse.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"u": torch.ones(3)}, ValueError, r"u must be \[N, D\]"),
        ({"u": torch.ones(3, 2), "v": torch.ones(3, 4)}, ValueError, r"\[3, 2\] and \[3, 4\]"),
        ({"u": torch.ones(3, 2, dtype=torch.float16)}, TypeError, "operand_dtype"),
        ({"u": torch.ones(3, 2), "v": torch.ones(3, 2).double()}, TypeError, "float64"),
        ({"v": torch.ones(3, 2, device="meta")}, TypeError, "one device"),  # once read memory that was not there
        ({"u": [[1.0]]}, TypeError, "u must be a tensor"),
        ({"scale": 0.0}, ValueError, "scale must be > 0"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"scale": float("inf")}, ValueError, "finite"),
        ({"scale": torch.tensor(-1.0)}, ValueError, "scale must be > 0"),
        ({"scale": torch.ones(1)}, ValueError, "0-d"),
        ({"exponents": (1.0, 2.0, 3.0)}, ValueError, "one or two"),
        ({"exponents": (0.0,)}, ValueError, "positive"),
        ({"num_images": 3}, ValueError, "whole views"),
        ({"num_images": -2}, ValueError, "whole views"),
        ({"num_images": 2, "positive_offset": 3}, ValueError, "inside the columns"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "int64"),
        ({"row_ids": torch.zeros(4)}, ValueError, "float32"),
        ({"col_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "second set"),
        ({"columns": True}, ValueError, "second set"),
        ({"only_equal_ids": True}, ValueError, "compares ids"),
        ({"ignored": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "divisor of 4 rows"),
        ({"ignored": torch.zeros(4, 1)}, ValueError, "float32"),
        ({"row_ids": [0, 0, 1, 1]}, TypeError, "row_ids must be a tensor"),
        ({"gate": (torch.ones(1, 4, 3), torch.ones(4, 3))}, TypeError, "contrastive_ext.Gate"),
        ({"gate": Gate(torch.ones(1, 0, 3), torch.ones(4, 3), torch.ones(4))}, ValueError, "a gate is"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 3), torch.ones(4))}, ValueError, "col_limit"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 2), torch.ones(4), torch.ones(4))}, ValueError, "a gate is"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 3).double(), torch.ones(4))}, TypeError, "features"),
        ({"operand_dtype": torch.int8}, TypeError, "operand_dtype must be"),
        ({"backend": "fastest"}, ValueError, "auto"),
        ({"backend": "reference"}, ValueError, "streams"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    with pytest.raises(error, match=says):
        row_stats(**({"u": torch.ones(4, 2), "scale": 1.0} | arguments))


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p[2] is not None and "columns" not in p[3]], ids=lambda p: p[0]
)
def test_means_and_maximum_without_a_gradient(run, problem, unit):
    backend, device = run
    u, v, scale, options = make_problem(problem, device, unit=unit)
    swept = row_stats(u, v, scale=scale, unit=unit, means=True, maximum=True, backend=backend, **options)
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
    keep = negatives(len(u), len(v), on_cpu, one_set=False)[0].to(device)
    s = (scale * (u @ v.T)).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(swept.aux, torch.stack([keep.sum(1).double(), s.amax(1)]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(swept.mean[0], s.softmax(1).nan_to_num(0.0) @ v, rtol=1e-12, atol=1e-13)
    for k, beta in enumerate(options.get("exponents", (1.0,))):
        torch.testing.assert_close(swept.lse[k], lse_of(s, keep, beta), rtol=1e-13, atol=1e-13)


def test_maximum_of_both_sides(run):
    backend, device = run
    u, v, scale, options = make_problem(next(p for p in PROBLEMS if p[0] == "clip"), device)
    some, everything = (
        row_stats(u, v, scale=scale, unit=True, backend=backend, **options, **more)
        for more in ({"maximum": True}, {"diagnostics": True})
    )
    torch.testing.assert_close(some.aux, everything.aux[:2])
    torch.testing.assert_close(some.col_aux, everything.col_aux[:2])


@pytest.mark.parametrize("function", ["row_stats", "ranked_stats"])
def test_a_gate_of_one_set_has_one_side(run, function):
    """Backends compute the score of a pair once or twice: with two sides they would disagree."""
    backend, device = run
    u = torch.randn(6, 3, dtype=torch.float64, device=device)
    guide, limit = torch.randn(6, 2, dtype=torch.float64, device=device), torch.zeros(6, dtype=torch.float64).to(device)
    calls = {
        "row_stats": lambda gate: row_stats(u, scale=2.0, gate=gate, backend=backend),
        "ranked_stats": lambda gate: ranked_stats(
            u, ranking=Ranking(0.1, 0.9, 0.9, 1e-3, 0), scale=2.0, gate=gate, backend=backend
        ),
    }
    call = calls[function]
    call(Gate(guide[None], guide.clone(), limit, limit.clone()))  # the values count, not whose memory they are in
    guide[0, 0] = torch.nan
    call(Gate(guide[None], guide.clone(), limit, limit.clone()))
    if device.type == "cpu":
        for gate in (Gate(guide[None], -guide, limit, limit), Gate(guide[None], guide, limit, limit + 1)):
            with pytest.raises(ValueError, match="one set"):
                call(gate)


def test_lists_belong_to_somebody_and_may_be_empty(run):
    backend, device = run
    u = torch.randn(6, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="G a divisor of 6"):
        row_stats(u, scale=2.0, ignored=torch.zeros(0, 4, dtype=torch.int64, device=device), backend=backend)
    for groups in (1, 6):
        none = torch.zeros(groups, 0, dtype=torch.int64, device=device)
        listed = row_stats(u, scale=2.0, num_images=6, ignored=none, backend=backend)
        plain = row_stats(u, scale=2.0, num_images=6, backend=backend)
        torch.testing.assert_close(listed.lse, plain.lse, rtol=1e-14, atol=1e-14)
        assert listed.aux.equal(plain.aux)


class _Watched(torch.Tensor):
    """A tensor that only its operators reach; notes which."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.overloadpacket.__name__)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("which", [0, 1])
def test_a_tensor_of_another_kind_on_either_side_meets_the_operator(run, which):
    backend, device = run
    u, v = (torch.randn(5, 16, device=device) for _ in range(2))
    expected = row_stats(u, v, scale=2.0, backend=backend)
    sides = [_Watched(x) if i == which else x for i, x in enumerate((u, v))]
    _Watched.seen.clear()
    torch.testing.assert_close(row_stats(*sides, scale=2.0, backend=backend).lse, expected.lse, rtol=0, atol=0)
    assert "row_stats" in _Watched.seen
