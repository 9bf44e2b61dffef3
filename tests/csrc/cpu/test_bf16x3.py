"""float32 operands in three bf16 parts, `operand_dtype="bf16x3"`: as exact as float32, on request only.

The model of the instructions multiplies, on every machine (csrc/cpu/tile_registers.h).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

import contrastive_ext as ce
from accuracy import Result, assert_as_accurate_as_dense, evaluate
from amx_model import multiply_by, the_model_multiplies
from contrastive_ext import row_stats
from contrastive_ext.backends import native
from contrastive_ext.operators.pair_sums import pair_sums
from problems import make_problem
from promises import check_accuracy
from rows import LOSSES, RANKED, RANKED_USAGES, USAGES, random_pairs

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
CPU = torch.device("cpu")
RUN = "cpu", CPU
SPLIT = "bf16x3"


@pytest.fixture(autouse=True)
def _by_the_model():
    with the_model_multiplies():
        yield


def split(loss):
    """The loss with products of parts where `cpu` computes it; truth and dense formula stay as they are."""

    @functools.wraps(loss.function)
    def function(*args, **options):
        return loss.function(*args, **options, **({"operand_dtype": SPLIT} if options["backend"] == "cpu" else {}))

    return replace(loss, function=function)


@pytest.mark.parametrize("inputs, temperature", [("random", 0.5), ("random", 0.01), ("peaked", 0.01)])
@pytest.mark.parametrize("usage", USAGES, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_every_loss(loss, usage, inputs, temperature):
    check_accuracy(split(loss), usage, inputs, 24, 33, torch.float32, temperature, RUN)


@pytest.mark.parametrize("ranked", RANKED, ids=lambda x: x.name)
@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_weights_by_rank(usage, ranked):
    check_accuracy(split(ranked), usage, "random", 24, 32, torch.float32, 0.2, RUN)


@pytest.mark.parametrize("b, d", [(1, 8), (2, 1), (33, 31), (150, 64)])
def test_every_shape(b, d):
    for loss in LOSSES[0], LOSSES[5]:
        for usage in USAGES[0], USAGES[-1], USAGES[6]:
            check_accuracy(split(loss), usage, "random", b, d, torch.float32, 0.2, RUN)


def test_strided_rows():
    wide = torch.randn(30, 2, 80)
    leaves = {"z1": wide[:, 0, ::2], "z2": wide.transpose(0, 2)[:40, 1].t()}
    results = [
        evaluate(ce.fused_infonce_loss, {n: x.contiguous() if copied else x for n, x in leaves.items()}, 1.0,
                 temperature=0.1, backend="cpu", operand_dtype=SPLIT)
        for copied in (False, True)
    ]  # fmt: skip
    assert torch.equal(results[0].loss, results[1].loss)
    assert all(torch.equal(results[0].grads[n], g) for n, g in results[1].grads.items())


# ---- the products


def logits(u, v, **how):
    """[N] of rows u [N, D] with one vector, in every bit: the largest logit of a row of one."""
    return row_stats(u, v, scale=1.0, maximum=True, backend="cpu", operand_dtype=SPLIT, **how)


def test_one_product_is_as_exact_as_two_additions():
    """One feature: what six products leave out is 2^-24 of the product, two additions round."""
    u = torch.randn(5000, 1) * torch.exp2(torch.randint(-20, 21, (5000, 1)))
    v = torch.tensor([[1.2345678]])
    exact = u.double() * v.double()
    error = (logits(u, v).aux[1][:, None] - exact).abs() / exact.abs()
    assert 2.0**-26 < error.max() <= 3.01 * 2.0**-24


@pytest.mark.parametrize("d", [1, 7, 33, 200])
def test_logits_are_the_same_bits_from_both_sides(d):
    """s_ij = s_ji, whatever the place of a row: one set is swept by its upper triangle."""
    u, v = torch.randn(70, d), torch.randn(1, d) * 0.3
    by_rows = logits(u, v).aux[1]
    assert torch.equal(by_rows, logits(v, u, columns=True).col_aux[1])
    assert torch.equal(by_rows.flip(0), logits(u.flip(0), v).aux[1])
    if d > 30:  # the sums are not exact: another order would show
        assert not torch.equal(by_rows, (u.double() @ v[0].double()).float())


SWEPT = [
    ("one_set", 330, None, {"num_images": 165}, "the triangle"),
    ("ids", 530, None, {"num_images": 265, "ids": "padded rows"}, "one that is not symmetric, two column tiles"),
    ("columns", 210, 530, {"gate": 1, "ids": "both", "columns": True, "exponents": (1.0, 2.0)}, "rows and columns"),
    ("few_rows", 5, 70, {"num_images": 5, "columns": True}, "less than a register"),
]  # fmt: skip


def swept(leaves, options, upstream, backend, split=None):
    """lse and gradients over them; `upstream` a factor of the gradient that is taken out again."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    dtype = leaves["u"].dtype
    options = options | {n: options[n].to(dtype) for n in ("scale",) if n in options}
    if "gate" in options:
        gate = options["gate"]
        tensors = (gate.scorers, gate.features, gate.row_limit, gate.col_limit)
        options["gate"] = type(gate)(*(None if x is None else x.to(dtype) for x in tensors))
    stats = row_stats(*leaves.values(), backend=backend, operand_dtype=split, **options)
    total = 0
    for lse in (stats.lse, stats.col_lse):
        weights = torch.linspace(0.5, 1.5, lse.numel(), dtype=torch.float64).reshape(lse.shape).to(dtype)
        total = total + (lse.where(lse.isfinite(), 0.0) * weights).sum()
    grads = torch.autograd.grad(total * upstream, list(leaves.values()))
    lse = stats.lse.detach()
    return Result(lse.where(lse.isfinite(), 0.0), {n: g / upstream for n, g in zip(leaves, grads, strict=True)})


@pytest.mark.parametrize("upstream", [2.0**-100, 1.0, 2.0**90])
@pytest.mark.parametrize("unit", [True, False], ids=["static", "online"])
@pytest.mark.parametrize("problem", SWEPT, ids=lambda p: p[0])
def test_sweeps_on_any_number_of_threads(problem, unit, upstream):
    u, v, scale, options = make_problem(problem, CPU, dtype=torch.float32, unit=unit)
    options |= {"scale": scale, "unit": unit}
    leaves = {n: x for n, x in (("u", u), ("v", v)) if x is not None}
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(swept(leaves, options, upstream, "cpu", SPLIT))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert torch.equal(again.loss, found[0].loss)
        assert all(torch.equal(again.grads[n], g) for n, g in found[0].grads.items())
    check_sweep(leaves, options, upstream, found[0])


def check_sweep(leaves, options, upstream, ours):
    truth = swept({n: x.double() for n, x in leaves.items()}, options, upstream, "torch")
    plain = swept(leaves, options, upstream, "torch")
    lengths = [x.double().norm(dim=1).max() for x in leaves.values()]
    largest = (lengths[0] * lengths[-1] * options["scale"]).item()
    assert_as_accurate_as_dense(ours, plain, truth, largest, {}, torch.float32)


@pytest.mark.parametrize("kind", ["rows", "small numbers", "denormals", "zeros", "one side"])
@pytest.mark.parametrize("sets", [1, 2])
def test_numbers_of_every_size(sets, kind):
    """Rows from 2^-20 to 2^20 and numbers that a common power of two would flush: each row against float64."""
    leaves = {"u": torch.randn(60, 40), "v": torch.randn(70, 40)}
    for x in leaves.values():
        if kind == "rows":
            x *= torch.exp2(torch.randint(-20, 21, (len(x), 1)))
        elif kind == "small numbers":
            x[:, ::3] *= torch.exp2(torch.randint(-60, 0, x[:, ::3].shape))
        elif kind == "denormals":
            x[:, ::3] = 3e-41
        elif kind == "zeros":
            x[::4], x[:, ::5] = 0, 0
    if kind == "one side":
        leaves["u"] *= 2.0**-40
    if sets == 1:
        leaves.pop("v")
    sizes = [x.norm(dim=1).max() for x in leaves.values()]
    options = {"scale": 30 / (sizes[0] * sizes[-1])}
    ours = swept(leaves, options, 1.0, "cpu", SPLIT)
    multiply_by("widened")
    plain = swept(leaves, options, 1.0, "cpu")
    multiply_by("model")
    assert not all(torch.equal(ours.grads[n], g) for n, g in plain.grads.items())  # not the widened path
    check_sweep(leaves, options, 1.0, ours)


def test_logits_of_small_rows_are_as_exact_as_their_own_size():
    u = normalize(torch.randn(200, 40)) * torch.exp2(torch.randint(-20, 21, (200, 1)))
    for v in u[:20].split(1):
        got, exact = logits(torch.cat([u, torch.full((1, 40), 2.0**20)]), v).aux[1][:200], u.double() @ v[0].double()
        bound = 40 * 2.0**-24 * u.double().norm(dim=1) * v.double().norm()
        assert ((got - exact).abs() <= bound).all()


def test_sums_over_pairs():
    exact = {}
    u, v, offset = normalize(torch.randn(40, 33)), normalize(torch.randn(50, 33)), torch.randn(40)
    for name, dtype, how in (
        ("truth", torch.float64, {"backend": "torch"}),
        ("plain", torch.float32, {"backend": "torch"}),
        ("ours", torch.float32, {"backend": "cpu", "operand_dtype": SPLIT}),
    ):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in (("u", u), ("v", v))}
        sums = pair_sums(*leaves.values(), offset=offset.to(dtype), scale=20.0, sign=-1, **how)
        grads = torch.autograd.grad(sums.sum.sum(), list(leaves.values()))
        exact[name] = Result(sums.sum.detach(), dict(zip(leaves, grads, strict=True)))
    assert_as_accurate_as_dense(exact["ours"], exact["plain"], exact["truth"], 20.0, {}, torch.float32)


# ---- what takes another way


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: z.index_fill(0, torch.tensor([3]), torch.nan),
        lambda z: z.index_fill(0, torch.tensor([3]), torch.inf),
        lambda z: z * 2.0**-60,
        lambda z: z * 2.0**56,
        lambda z: torch.cat([z[:-1], z[-1:] * 2.0**-60]),
        torch.zeros_like,
    ],
    ids=["nan", "inf", "tiny", "huge", "a tiny row", "zero"],
)
def test_what_parts_cannot_hold_is_multiplied_as_float32(spoil):
    """The same bits as without the request."""
    u, v = torch.randn(40, 20), torch.randn(50, 20)
    for a, b in ((spoil(u), v), (u, spoil(v))):
        results = []
        for how in ({"operand_dtype": SPLIT}, {}):
            leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            lse = row_stats(*leaves, scale=0.5, backend="cpu", **how).lse
            results.append([lse.detach(), *torch.autograd.grad(lse.sum(), leaves)])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))


def test_bf16_numbers_are_one_part():
    """The same bits as where nobody asked: the numbers decide."""
    u, v = torch.randn(40, 20).bfloat16().float(), torch.randn(50, 20).bfloat16().float()
    asked, plain = (swept({"u": u, "v": v}, {"scale": torch.tensor(0.5)}, 1.0, "cpu", how) for how in (SPLIT, None))
    assert torch.equal(asked.loss, plain.loss) and torch.equal(asked.grads["u"], plain.grads["u"])


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_those_of_float32(upstream):
    u, v = torch.randn(40, 20), torch.randn(50, 20)
    grad = torch.ones(1, 40)
    grad[0, 5] = upstream
    results = []
    for how in ({"operand_dtype": SPLIT}, {}):
        leaves = [u.clone().requires_grad_(), v.clone().requires_grad_()]
        lse = row_stats(*leaves, scale=0.5, backend="cpu", **how).lse
        results.append(torch.autograd.grad(lse, leaves, grad))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_without_amx_the_request_is_an_error_with_the_reason(backend):
    z1, z2 = random_pairs(6, 8, torch.float32, CPU)
    multiply_by("widened")
    for call in (
        lambda: ce.fused_infonce_loss(z1, z2, backend=backend, operand_dtype=SPLIT),
        lambda: row_stats(z1, z2, scale=2.0, backend=backend, operand_dtype=SPLIT),
    ):
        with pytest.raises(RuntimeError, match="its 'bf16x3' products need AMX: it was asked for"):
            call()
    with pytest.raises(RuntimeError, match="no backend has operand_dtype='bf16x3'"):
        ce.explain(z1, operand_dtype=SPLIT)
    expected = ce.fused_infonce_loss(z1, z2, backend="reference")  # exact anyway
    assert torch.equal(ce.fused_infonce_loss(z1, z2, backend="reference", operand_dtype=SPLIT), expected)
    arguments = [z1, z2, 2.0, [1.0], 6, 0, False, *(None,) * 7, False, True]
    with pytest.raises(RuntimeError, match="need AMX"):  # the operator does not compute something else either
        torch.ops.contrastive_ext.row_stats_forward_cpu(*arguments, False, False, False, False)


def test_who_multiplies_is_said():
    z = torch.randn(8, 16)
    assert ce.explain(z, operand_dtype=SPLIT).notes["cpu"] == "bf16 products: model"
    assert ce.explain(z, operand_dtype=SPLIT).chosen == "cpu"
    assert "has no 'bf16x3' products" in ce.explain(z, operand_dtype=SPLIT).reasons["torch"]
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match="got 'bf16x3'"):
            ce.fused_infonce_loss(z.to(dtype), z.to(dtype), operand_dtype=SPLIT)


def test_one_graph():
    z1, z2 = random_pairs(12, 8, torch.float32, CPU)

    def step(z1, z2):
        return ce.fused_infonce_loss(z1, z2, 0.2, backend="cpu", operand_dtype=SPLIT)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z1, z2), step(z1, z2))
