"""bf16 operands on the `cpu` backend by tile registers: every loss, through the model of the instructions.

On machines without AMX these products would be widened; here the model multiplies, and the error rule is the same.
"""

from __future__ import annotations

import sys

import pytest
import torch

import contrastive_ext as ce
from accuracy import Result, assert_as_accurate_as_dense, evaluate
from amx_model import multiply_by, the_model_multiplies
from contrastive_ext import row_stats
from contrastive_ext.backends import native
from problems import make_problem
from promises import check_accuracy
from rows import LOSSES, RANKED, RANKED_USAGES, USAGES, random_pairs

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
RUN = "cpu", torch.device("cpu")
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _by_the_model():
    with the_model_multiplies():
        yield


def rounded(z):
    return z.to(BFLOAT16).float()


def test_products_are_those_of_the_registers():
    """Odd elements have a sum of their own: summed in order this row would lose all but the first."""
    half = 2.0**-24
    u, v = torch.tensor([[1, half, half, half]]), torch.ones(1, 4)
    logit = {}
    for name in ("model", "widened"):
        multiply_by(name)
        logit[name] = row_stats(u, v, scale=1.0, backend="cpu").lse.item()
    assert logit["model"] == 1 + 2 * half
    if sys.platform != "darwin":  # there the order is Accelerate's
        assert logit["widened"] == 1.0


@pytest.mark.parametrize("inputs, temperature", [("random", 0.1), ("peaked", 0.02), ("random", 100.0)])
@pytest.mark.parametrize("usage", USAGES, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
def test_every_loss(loss, usage, inputs, temperature):
    check_accuracy(loss, usage, inputs, 24, 33, BFLOAT16, temperature, RUN)


@pytest.mark.parametrize("usage", RANKED_USAGES, ids=lambda u: u.name)
def test_weights_by_rank(usage):
    check_accuracy(RANKED[0], usage, "random", 24, 32, BFLOAT16, 0.2, RUN)


@pytest.mark.parametrize("b, d", [(1, 8), (2, 1), (33, 31), (150, 64)])
def test_every_shape(b, d):
    for loss in LOSSES[0], LOSSES[5]:
        for usage in USAGES[0], USAGES[-1], USAGES[6]:
            check_accuracy(loss, usage, "random", b, d, BFLOAT16, 0.2, RUN)


LABELS = torch.arange(40) // 2
SETS = {
    "histogram": lambda a, b, **how: ce.fused_bayesian_loss(a, b, 0.3, ranks="histogram", bins=64, **how),
    "supcon": lambda a, b, **how: ce.fused_supcon_loss(torch.stack([a, b]), LABELS, 0.1, **how),
    "supcon_in": lambda a, b, **how: ce.fused_supcon_loss(torch.stack([a, b]), LABELS, 0.1, "in", **how),
    "eliminate": lambda a, b, **how: ce.fused_false_negative_loss(
        torch.stack([a, b]), 0.1, mode="eliminate", top_k=2, threshold=None, **how
    ),
    "attract": lambda a, b, **how: ce.fused_false_negative_loss(
        torch.stack([a, b]), 0.1, mode="attract", top_k=2, threshold=None, **how
    ),
    "soft_target": lambda a, b, **how: ce.fused_soft_target_loss(a, b, b, 0.1, teacher_temperature=0.2, **how),
    "self_labeling": lambda a, b, **how: ce.fused_self_labeling_loss(
        a, b, b.detach().flip(0), a.detach(), perm=torch.arange(40).flip(0), theta=0.3, temperature=0.2, **how
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_losses_over_sets(name):
    """Unit rows rounded beforehand, so that float64 sees the same ones; no feature of theirs is normalised again."""
    z1, z2 = random_pairs(40, 33, torch.float32, RUN[1])
    inputs = {x: torch.nn.functional.normalize(z).to(BFLOAT16) for x, z in (("a", z1), ("b", z2))}
    ours, dense = (evaluate(SETS[name], inputs, 1.0, normalize=False, backend=x) for x in ("cpu", "reference"))
    exact = {x: z.double() for x, z in inputs.items()}
    truth = evaluate(SETS[name], exact, 1.0, normalize=False, backend="reference")
    assert_as_accurate_as_dense(ours, dense, truth, 10.0, {}, BFLOAT16)


PROBLEMS = [
    ("one_set", 330, None, {"num_images": 165}, "the triangle"),
    ("ids", 530, None, {"num_images": 265, "ids": "padded rows"}, "one that is not symmetric, two column tiles"),
    ("columns", 210, 530, {"gate": 1, "ids": "both", "columns": True, "exponents": (1.0, 2.0)}, "rows and columns"),
    ("few_rows", 5, 70, {"num_images": 5, "columns": True}, "less than a register"),
]  # fmt: skip


@pytest.mark.parametrize("upstream", [2.0**-100, 1.0, 2.0**90])
@pytest.mark.parametrize("unit", [True, False], ids=["static", "online"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p[0])
def test_float32_that_bf16_holds_keeps_the_accuracy_of_float32(problem, unit, upstream):
    """Weights in three parts are float32 weights in every bit: float32 gradients are no worse than those of widened
    operands, which two parts would not give. The same bits again, and on any number of threads."""
    u, v, scale, options = make_problem(problem, RUN[1], dtype=torch.float32, unit=unit)
    u, v = rounded(u), None if v is None else rounded(v)
    options["unit"] = unit and problem[0] != "columns"  # a row of bf16 numbers is a little longer or shorter than 1
    weights = torch.rand(len(options.get("exponents", (1.0,))), len(u)) + 0.5

    def swept(dtype, name, backend="cpu"):
        multiply_by(name)
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in (("u", u), ("v", v)) if x is not None}
        more = {} if "gate" not in options else {"gate": _as(options["gate"], dtype)}
        lse = row_stats(*leaves.values(), scale=scale.to(dtype), backend=backend, **options | more)
        total = (lse.lse.where(lse.lse.isfinite(), 0.0) * weights.to(dtype)).sum()
        if options.get("columns"):
            total = total + lse.col_lse.where(lse.col_lse.isfinite(), 0.0).sum() / 3
        grads = torch.autograd.grad(total * upstream, list(leaves.values()))
        return Result(lse.lse.detach(), {n: g / upstream for n, g in zip(leaves, grads, strict=True)})

    def finite(result):
        return Result(result.loss.where(result.loss.isfinite(), 0.0), result.grads)

    truth = swept(torch.float64, "widened", "torch")
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(swept(torch.float32, "model"))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert torch.equal(again.loss, found[0].loss)
        assert all(torch.equal(again.grads[n], g) for n, g in found[0].grads.items())
    plain = swept(torch.float32, "widened")
    largest = (u.norm(dim=1).max() * (u if v is None else v).norm(dim=1).max() * scale).item()
    assert_as_accurate_as_dense(finite(found[0]), finite(plain), finite(truth), largest, {}, torch.float32)


def _as(gate, dtype):
    return type(gate)(*(None if x is None else x.to(dtype) for x in (
        gate.scorers, gate.features, gate.row_limit, gate.col_limit
    )))  # fmt: skip


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: z * (1 + 2**-12),  # not bf16
        lambda z: z.index_fill(0, torch.tensor([3]), torch.nan),
        lambda z: z.index_fill(0, torch.tensor([3]), torch.inf),
        lambda z: z * 2.0**-60,  # products would be flushed to zero, or overflow
        lambda z: z * 2.0**40,
        torch.zeros_like,
    ],
    ids=["float32", "nan", "inf", "tiny", "huge", "zero"],
)
def test_what_registers_cannot_hold_is_widened(spoil):
    """The same bits as without them."""
    u, v = rounded(torch.randn(40, 20)), rounded(torch.randn(50, 20))
    for a, b in ((spoil(u), v), (u, spoil(v))):
        results = []
        for name in ("model", "widened"):
            multiply_by(name)
            leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            lse = row_stats(*leaves, scale=0.5, backend="cpu").lse
            results.append([lse.detach(), *torch.autograd.grad(lse.sum(), leaves)])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))


@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_those_of_float32(upstream):
    u, v = rounded(torch.randn(40, 20)), rounded(torch.randn(50, 20))
    grad = torch.ones(1, 40)
    grad[0, 5] = upstream
    results = []
    for name in ("model", "widened"):
        multiply_by(name)
        leaves = [u.clone().requires_grad_(), v.clone().requires_grad_()]
        lse = row_stats(*leaves, scale=0.5, backend="cpu").lse
        results.append(torch.autograd.grad(lse, leaves, grad))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert results[0][0][5].isfinite().logical_not().all() and results[0][0][6].isfinite().all()


def test_explain_says_who_multiplies():
    z = torch.randn(8, 16)
    assert ce.explain(z.to(BFLOAT16)).notes["cpu"] == "bf16 products: model"
    multiply_by("widened")
    assert ce.explain(z.to(BFLOAT16)).notes["cpu"] == "bf16 products widened to float32: it was asked for"
    assert "cpu" not in ce.explain(z).notes
    multiply_by("auto")
    who, _, why = native.build_info()["cpu_bf16"].partition(": ")
    assert who == multiply_by("") and (who == "amx") == (not why)
    with pytest.raises(RuntimeError, match="cannot be cuda here; auto, model and widened always can"):
        multiply_by("cuda")
