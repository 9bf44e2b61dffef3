"""Numbers at the ends of their range: one feature, rows whose squares overflow, infinities, parameters that the dtype
cannot hold, upstream gradients near zero, positives far above everything else."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

import contrastive_ext as ce
from accuracy import assert_as_accurate_as_dense, evaluate, on_rounded_operands
from contrastive_ext import numerics
from contrastive_ext.backends.triton import launch
from contrastive_ext.operators.row_stats import row_stats
from contrastive_ext.problem.ranking import Ranking
from rows import LOSSES, peaked_pairs, random_pairs

B, D = 6, 4
LABELS = torch.arange(B) // 2
MIXING = {"perm": torch.arange(B).flip(0), "theta": 0.3}


def _pairs(function, **fixed):
    def call(a, b, extra=None, **how):
        return function(a, b, 0.3, **fixed, **how)

    return call


def _own_negatives(a, b, extra, **how):
    how.pop("queue", None)
    return ce.fused_hard_negative_loss(a, b, 0.3, layout="one_way", negatives=extra.transpose(0, 1), **how)


def _false_negatives(**fixed):
    return lambda a, b, extra, **how: ce.fused_false_negative_loss(
        torch.stack([a, b]), 0.3, support=extra, **fixed, **how
    )


def _self_labeling(a, b, extra, queue=None, **how):
    return ce.fused_self_labeling_loss(a, b, queue, a + 0.1 * b, **MIXING, temperature=0.3, **how)


# every road a gradient takes; `extra` [2, B, D] are further views, without a gradient where they only score
ROADS = {
    "infonce": _pairs(ce.fused_infonce_loss),
    "decoupled": _pairs(ce.fused_decoupled_loss),
    "debiased": _pairs(ce.fused_debiased_loss, tau_plus=0.05),
    "hard": _pairs(ce.fused_hard_negative_loss, tau_plus=0.05),
    "ids": _pairs(ce.fused_infonce_loss, ids=LABELS),
    "positives": lambda a, b, extra, **how: ce.fused_debiased_loss(a, b, 0.3, 0.05, positives=extra, **how),
    "own_negatives": _own_negatives,
    "bayesian": _pairs(ce.fused_bayesian_loss),
    "false_negative": _false_negatives(top_k=3, threshold=None),
    "false_negative_threshold": _false_negatives(top_k=None, threshold=0.1),
    "false_negative_eliminate": _false_negatives(top_k=None, threshold=0.1, mode="eliminate"),
    "soft_target": lambda a, b, extra, **how: ce.fused_soft_target_loss(a, b, b, 0.3, teacher_temperature=0.2, **how),
    "self_labeling": _self_labeling,
    "supcon": lambda a, b, extra, queue=None, **how: ce.fused_supcon_loss(torch.stack([a, b]), LABELS, 0.3, **how),
    "supcon_in": lambda a, b, extra, queue=None, **how: ce.fused_supcon_loss(
        torch.stack([a, b]), LABELS, 0.3, "in", **how
    ),
}
every_road = pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)


@pytest.fixture(params=["reference", "auto", "torch"])
def cpu_backend(request) -> str:
    return request.param


def _inputs(dtype=torch.float32, device="cpu"):
    a, b = torch.randn(2, B, D, dtype=torch.float64).to(device, dtype)
    return a, b, torch.randn(2, B, D, dtype=torch.float64).to(device, dtype)


# ---- rows to unit length


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_one_feature_are_exactly_one(run, dtype):
    """As products of a reciprocal some would be one rounding off, and ties of ranks would break by chance."""
    backend, device = run
    z1, z2 = random_pairs(40, 1, dtype, device)
    assert (numerics.normalize(z1.to(numerics.stats_dtype(dtype))).abs() == 1).all()
    for function in (ce.fused_infonce_loss, ce.fused_bayesian_loss):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        value = function(*leaves, backend=backend)
        assert torch.equal(value, function(z1.sign(), z2.sign(), normalize=False, backend=backend))
        assert all((grad == 0).all() for grad in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])  # exponents of rows whose squares are finite, overflow, far overflow
def test_length_of_a_row_does_not_matter(run, backend, share):
    backend, device = backend or run[0], run[1]
    z1, z2 = random_pairs(7, 5, torch.float32, device)
    lengths = torch.ones(7, 1, device=device)
    lengths[::2] = 2.0 ** int(share * 124)  # of at most 16
    plain = evaluate(ce.fused_infonce_loss, {"z1": z1, "z2": z2}, 1.0, backend=backend)
    long = evaluate(ce.fused_infonce_loss, {"z1": z1 * lengths, "z2": z2 * lengths}, 2.0**40, backend=backend)
    assert torch.equal(long.loss, plain.loss)
    for name, grad in plain.grads.items():
        rounding = 2.0**-149 * lengths / 2.0**40  # a gradient may be subnormal
        scaled = long.grads[name].double() * lengths.double() / 2.0**40
        slack = 4 * torch.finfo(torch.float32).eps * grad.abs().max() + rounding.double()
        assert ((scaled - grad).abs() <= slack).all()


# ---- gradients inside autocast, batched, forward-mode


@every_road
def test_autocast_around_the_backward_does_not_move_a_gradient_by_a_bit(cpu_backend, road):
    inputs, results = _inputs(), []
    queue = torch.randn(7, D)
    for options in ({}, {"queue": queue}):
        for enabled in (False, True):
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = road(*leaves, backend=cpu_backend, **options)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True))
    for plain, cast in (results[:2], results[2:]):
        assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize("name", ["positives", "own_negatives", "false_negative_threshold"])
def test_a_second_derivative_of_the_reference_inside_autocast_is_the_same(name):
    inputs, results = _inputs(), []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = ROADS[name](*leaves, backend="reference")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (grad,) = torch.autograd.grad(value, leaves[:1], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), leaves, materialize_grads=True, allow_unused=True))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["positives", "own_negatives", "supcon"])
def test_compiled_inside_autocast_is_the_same(cpu_backend, name):
    inputs, results = _inputs(), []
    for enabled in (False, True):
        torch._dynamo.reset()
        step = torch.compile(lambda *x: ROADS[name](*x, backend=cpu_backend), backend="aot_eager", fullgraph=True)
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = step(*leaves)
            grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
        results.append([value.detach(), *grads])
    assert all(map(torch.equal, *results))


def _check_jacobian(road, backend: str) -> None:
    a, *others = _inputs(torch.float64)

    def value(a):
        return road(a, *others, reduction="none", backend=backend)

    one_by_one = torch.autograd.functional.jacobian(value, a)
    batched = torch.autograd.functional.jacobian(value, a, vectorize=True)
    torch.testing.assert_close(batched, one_by_one, rtol=1e-12, atol=1e-14)


@every_road
def test_gradients_come_in_batches(cpu_backend, road):
    """`torch.autograd.functional.jacobian(vectorize=True)` and `is_grads_batched` ask for many at once."""
    _check_jacobian(road, cpu_backend)


@pytest.mark.interpreter
@pytest.mark.skipif(not launch.interpreted(), reason="for Triton's interpreter")
@every_road
def test_gradients_come_in_batches_from_triton(road):
    _check_jacobian(road, "triton")


@every_road
def test_the_reference_differentiates_in_forward_mode(road):
    a, b, extra = _inputs(torch.float64)
    leaf, tangent = a.clone().requires_grad_(), torch.randn_like(a)
    expected = (torch.autograd.grad(road(leaf, b, extra, backend="reference"), leaf)[0] * tangent).sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        value = road(dual, b, extra, backend="reference")
        ours = torch.autograd.forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# ---- positives far above everything else, tiny gradients, the highest rank


@pytest.mark.parametrize("tau_plus", [0.0, 0.05])
@pytest.mark.parametrize("function", [ce.fused_debiased_loss, ce.fused_hard_negative_loss])
def test_reference_with_positives_far_above_the_row(function, tau_plus):
    """exp(correction - shift) overflows in float32 where a further view is the anchor and all else is far away."""
    z1, z2 = random_pairs(8, 16)
    inputs = {"z1": z1, "z2": z2, "positives": torch.stack([z1, z2])}
    options = {"temperature": 0.005, "tau_plus": tau_plus}
    for backend in ("reference", "auto"):
        ours = evaluate(function, inputs, 1.0, backend=backend, **options)
        in_double = {name: x.double() for name, x in inputs.items()}
        truth = evaluate(on_rounded_operands(function, True), in_double, 1.0, dtype=torch.float32, **options)
        assert_as_accurate_as_dense(ours, ours, truth, 1 / 0.005, {}, torch.float32)
        assert (ours.loss - truth.loss).abs() <= 4 * 2.0**-23 / 0.005 * max(1.0, truth.loss)


@pytest.mark.parametrize("upstream", [2.0**-100, 2.0**-83, 2.0**83])
@pytest.mark.parametrize("pairs", [random_pairs, peaked_pairs])
@pytest.mark.parametrize("loss", [x for x in LOSSES if not x.vectors(torch.ones(1, 1))], ids=lambda x: x.name)
def test_gradients_at_the_ends_of_the_range(run, loss, pairs, upstream):
    """At this temperature one exponential serves both directions, whose factor e^-lse takes a small upstream gradient
    out of the normal range."""
    backend, device = run
    z1, z2 = pairs(33, 16, torch.float32, device)
    options = {"temperature": 0.0226, **loss.parameters, "tau_plus": 0.0}
    if "tau_plus" not in loss.parameters:
        options.pop("tau_plus")
    for layout in ("two_view", "symmetric"):
        plain, scaled = (
            evaluate(loss.function, {"z1": z1, "z2": z2}, x, layout=layout, backend=backend, **options)
            for x in (1.0, upstream)
        )
        for name, grad in plain.grads.items():
            slack = 64 * torch.finfo(torch.float32).eps / 0.0226 * grad.abs().max()
            slack += torch.finfo(torch.float32).tiny / min(1.0, upstream)  # the gradient itself may underflow
            assert ((scaled.grads[name].double() / upstream - grad).abs() <= slack).all()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("alpha, beta, tau_plus", [(0.9, 0.0, 0.1), (0.5, 0.0, 0.0), (1.0, 0.0, 0.1), (0.9, 0.9, 0.1)])
def test_weights_of_ranks_keep_their_digits(alpha, beta, tau_plus, eps):
    count, dtype = 1000, torch.float32
    ranks = torch.tensor([1, 2, 500, 998, 999, 1000], dtype=dtype)
    ours = Ranking(tau_plus, alpha, beta, eps, bins=0).weight_of_rank(ranks, torch.tensor(count, dtype=dtype))
    for rank, weight in zip(ranks.int().tolist(), ours.tolist(), strict=True):
        expected = _published_weight(Decimal(rank) / count, *map(Decimal, (alpha, beta, tau_plus, eps)))
        assert abs(Decimal(weight) - expected) <= 8 * Decimal(torch.finfo(dtype).eps) * expected + Decimal("1e-30")


def _published_weight(u: Decimal, alpha: Decimal, beta: Decimal, tau: Decimal, eps: Decimal) -> Decimal:
    """The formula as the paper has it, with fifty digits to lose."""
    with localcontext() as context:
        context.prec = 60
        a = (1 - 2 * alpha) * (1 - 2 * tau) + eps
        b = 2 * (alpha * (1 - tau) + (1 - alpha) * tau)
        phi = 2 * u / (b + max(Decimal(0), b * b + 4 * a * u).sqrt())
        norm = alpha * (1 - beta) + (1 - alpha) * beta + eps
        weight = (2 * alpha * (1 - beta) * (1 - phi) + 2 * (1 - alpha) * beta * phi) / norm
        return weight / (b * (1 - phi) + (2 - b) * phi)


@pytest.mark.parametrize("ranks", ["exact", "histogram"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_only_negative_keeps_the_digits_of_its_weight(run, ranks, eps):
    """With beta = 0 the highest rank weighs next to nothing; decoupled rows would show it as it is."""
    backend, device = run
    z1, z2 = random_pairs(2, 6, torch.float32, device)
    _, stats = ce.fused_bayesian_loss(
        z1, z2, beta=0.0, eps=eps, ranks=ranks, layout="one_way", return_stats=True, backend=backend
    )
    expected = _published_weight(Decimal(1), *map(Decimal, (0.9, 0.0, 0.1, eps)))
    assert abs(stats.max_weight.item() / float(expected) - 1) <= 8 * 2.0**-23


# ---- NaN and infinity


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("normalize", [True, False])
@every_road
def test_what_is_not_finite_reaches_the_loss(run, road, normalize, bad):
    """Wherever it stands; with positive vectors, so that no infinite product is NaN by itself."""
    backend, device = run
    if device.type != "cpu":
        pytest.skip("the roads' ids and permutations are on the CPU")
    for at in range(4):
        inputs = [x.abs() for x in (*_inputs(), torch.randn(7, D))]
        if road in (ROADS["own_negatives"], ROADS["supcon"], ROADS["supcon_in"]) and at == 3:
            continue
        if at == 2 and road not in (ROADS["positives"], ROADS["own_negatives"]):
            continue  # what only scores is found like nothing
        inputs[at][..., 1, 0] = bad
        for chosen in (backend, "reference"):
            value = road(*inputs[:3], queue=inputs[3], normalize=normalize, backend=chosen)
            assert not value.isfinite()


@pytest.mark.parametrize("normalize", [True, False])
def test_an_infinite_positive_is_no_perfect_match(run, normalize):
    backend, device = run
    z1, z2 = random_pairs(5, 3, torch.float32, device)
    z2[2] = math.inf
    for function in (ce.fused_infonce_loss, ce.fused_debiased_loss):
        losses = function(
            z1.abs(), z2.abs(), layout="one_way", negatives=z1.abs(), in_batch_negatives=False,
            normalize=normalize, reduction="none", backend=backend,
        )  # fmt: skip
        assert losses.isfinite().tolist() == [True, True, False, True, True]


# ---- parameters


Z = torch.randn(B, D)
MIXED = {"q_mix": Z, **MIXING}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda how: ce.fused_hard_negative_loss(Z, Z, beta=1e39, **how), "finite in torch.float32"),
        (lambda how: ce.fused_hard_negative_loss(Z, Z, beta=1e-46, **how), "exponents"),
        (lambda how: ce.fused_hard_negative_loss(Z, Z, 1e-10, beta=1e30, **how), "1/temperature = 1"),
        (lambda how: ce.fused_hard_negative_loss(Z, Z, torch.tensor(1e-10), beta=1e30, **how), "1/temperature = "),
        (lambda how: ce.fused_soft_target_loss(Z, Z, Z, teacher_temperature=1e-40, **how), "teacher_temperature"),
        (lambda how: ce.fused_self_labeling_loss(Z, Z, None, **MIXED, mu=1e39, **how), "mu must be"),
        (lambda how: ce.fused_self_labeling_loss(Z, Z, None, **MIXED, label_temperature=1e-40, **how), "label_temp"),
        (
            lambda how: ce.fused_self_labeling_loss(
                Z, Z, None, **MIXED, temperature=1e-20, label_temperature=1e-20, **how
            ),
            "label_temperature",
        ),
        (lambda how: ce.fused_infonce_loss(Z, Z, guide=ce.Guide(Z, Z, margin=1e39), **how), "margin must be finite"),
        (lambda how: ce.fused_bayesian_loss(Z, Z, eps=1e39, **how), "eps"),
    ],
)
def test_ranges_are_those_of_the_dtype_that_computes(call, says, backend):
    with pytest.raises(ValueError, match=says):
        call({"backend": backend})


def test_the_operator_checks_its_ranges_too():
    with pytest.raises(ValueError, match="exponents"):
        row_stats(Z, scale=1.0, exponents=(1e-46,))
    with pytest.raises(ValueError, match=r"scale must be > 0 and finite in torch\.float32"):
        row_stats(Z, scale=1e39)
    assert row_stats(Z.double(), scale=1.0, exponents=(1e-46,)).lse.isfinite().all()


@pytest.mark.parametrize("tau_plus", [1e-50, 1 - 1e-9])
def test_probabilities_that_round_to_their_limit(run, tau_plus):
    backend, device = run
    z1, z2 = random_pairs(9, 5, torch.float32, device)
    ours, truth = (
        ce.fused_debiased_loss(z1.to(d), z2.to(d), tau_plus=tau_plus, backend=b)
        for d, b in ((torch.float32, backend), (torch.float64, "reference"))
    )
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


def test_an_array_is_no_number():
    for name in ("temperature", "logit_scale"):
        with pytest.raises(TypeError, match=f"{name} must be a number; got ndarray"):
            ce.fused_infonce_loss(Z, Z, **{name: np.array([0.5])})
    for number in (np.float32(0.5), np.array(0.5)):
        assert torch.equal(ce.fused_infonce_loss(Z, Z, number), ce.fused_infonce_loss(Z, Z, 0.5))


@pytest.mark.parametrize("loss", LOSSES[:1] + LOSSES[3:4], ids=lambda x: x.name)
def test_none_at_the_call_of_a_module_takes_its_own_temperature(loss):
    own = loss.module(0.07, **loss.parameters)
    other = Z + 0.1 * torch.randn(B, D)
    expected = own(Z, other)
    assert torch.equal(own(Z, other, temperature=None), expected)
    assert torch.equal(own(Z, other, temperature=None, logit_scale=None), expected)
    assert torch.equal(own(Z, other, temperature=None, logit_scale=2.0), own(Z, other, logit_scale=2.0))


def test_none_at_the_call_of_other_modules_too():
    for module, inputs in (
        (ce.SupConLoss(0.07), (Z, LABELS)),
        (ce.FalseNegativeLoss(0.07), (torch.stack([Z, Z.flip(0)]),)),
        (ce.SelfLabelingLoss(0.07), (Z, Z.flip(0))),
        (ce.SoftTargetLoss(0.07, teacher_temperature=0.1), (Z, Z.flip(0), Z)),
    ):
        assert torch.equal(module(*inputs, temperature=None), module(*inputs))


@pytest.mark.parametrize("dtype, last", [(torch.float32, 2.0**16), (torch.float64, 2.0**45)])
def test_hard_negatives_whose_sums_round_away_are_refused_and_others_are_right(run, dtype, last):
    """log R = log N + lse_{1+beta} - lse_beta, two numbers of size beta/t: by then R is the largest negative alone."""
    backend, device = run
    z1, z2 = random_pairs(9, 5, dtype, device)
    for beta in (last, 1e20, 1e36):
        for name in (backend, "reference"):
            with pytest.raises(ValueError, match="tell their log-sum-exps apart"):
                ce.fused_hard_negative_loss(z1, z2, 1.0, beta=beta, backend=name)
    loss, truth = (
        ce.fused_hard_negative_loss(z1.to(d), z2.to(d), 1.0, tau_plus=0.0, beta=last - 1, backend=b)
        for d, b in ((dtype, backend), (torch.float64, "reference"))
    )
    torch.testing.assert_close(loss.double(), truth, rtol=0, atol=4 * 2.0**-7)


@pytest.mark.parametrize("width, operand_dtype", [(8, None), (8, torch.float16), (300, None), (300, torch.float16)])
@pytest.mark.parametrize("layout", ["two_view", "symmetric"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_upstream_gradients_do_not_underflow(run, reduction, layout, width, operand_dtype):
    """One exponential for both directions takes a coefficient times exp(-lse): at t = .03 up to 1e-15 of it."""
    backend, device = run
    z1, z2 = (z.requires_grad_() for z in random_pairs(20, width, torch.float32, device))
    how = {"layout": layout, "reduction": reduction, "operand_dtype": operand_dtype}
    if reduction == "mean":
        how["ids"] = torch.arange(20, device=device) // 2
    loss = ce.fused_infonce_loss(z1, z2, 0.03, backend=backend, **how)
    gradients = [
        torch.autograd.grad(loss, [z1, z2], torch.full_like(loss, 2.0**power), retain_graph=True)
        for power in (0, -100, 60)
    ]
    for plain, small, large in zip(*gradients, strict=True):
        close = 64 * torch.finfo(torch.float32).eps * plain.abs().max().item()
        torch.testing.assert_close(small * 2.0**100, plain, rtol=0, atol=close)
        torch.testing.assert_close(large * 2.0**-60, plain, rtol=0, atol=close)
