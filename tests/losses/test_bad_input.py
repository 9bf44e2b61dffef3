"""Bad input raises before anything is computed, saying what was expected, what came and what to do; good input of any
shape works."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contrastive_ext as ce
from rows import LOSSES

Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"z1": [[1.0]]}, TypeError, "z1 must be a tensor; got list"),
        ({"z1": Z.long()}, TypeError, "float16, bfloat16, float32 or float64; got torch.int64"),
        ({"z2": Z.double()}, TypeError, "share dtype and device; got torch.float32 on cpu and torch.float64"),
        ({"z1": Z[0], "z2": Z[0]}, ValueError, r"\[B, D\]"),
        ({"z1": Z[None], "z2": Z[None]}, ValueError, r"got \[1, 4, 3\]"),
        ({"z1": Z[:0], "z2": Z[:0]}, ValueError, "B, D >= 1"),
        ({"z1": Z[:, :0], "z2": Z[:, :0]}, ValueError, "B, D >= 1"),
        ({"z1": Z.to_sparse(), "z2": Z.to_sparse()}, TypeError, "dense"),
        ({"z2": Z[:3]}, ValueError, r"same shape \[B, D\]; got \[4, 3\] and \[3, 3\]"),
        ({"z2": Z[:3], "layout": "one_way"}, ValueError, "M >= B"),
        ({"z2": Z[:3], "layout": "symmetric"}, ValueError, "M >= B"),
        ({"layout": "three_view"}, ValueError, "two_view, one_way, symmetric"),
        ({"reduction": "average"}, ValueError, "mean, sum, none"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"temperature": -1.0}, ValueError, "got -1.0"),
        ({"temperature": float("nan")}, ValueError, "nan"),
        ({"temperature": float("inf")}, ValueError, "finite"),
        ({"temperature": "0.5"}, TypeError, "temperature must be a number; got str"),
        ({"temperature": [0.5]}, TypeError, "temperature must be a number; got list"),
        ({"temperature": 1e-42}, ValueError, "temperature must be > 0 and finite in torch.float32"),  # 1/t overflows
        ({"temperature": torch.tensor(-0.5)}, ValueError, "got -0.5"),
        ({"temperature": torch.tensor(1e-42)}, ValueError, "finite"),
        ({"temperature": torch.tensor(float("inf"))}, ValueError, "got inf"),
        ({"temperature": torch.tensor(float("nan"))}, ValueError, "got nan"),
        ({"temperature": torch.ones(2)}, ValueError, "0-d"),
        ({"temperature": torch.ones(1, 1)}, ValueError, "0-d"),
        ({"temperature": torch.tensor(1)}, ValueError, "int64"),
        ({"temperature": 0.5, "logit_scale": 2.0}, ValueError, "not both"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be > 0"),
        ({"queue": Z.tolist()}, TypeError, "queue must be a tensor; got list"),
        ({"negatives": Z.tolist(), "layout": "one_way"}, TypeError, "negatives must be a tensor; got list"),
        ({"ids": [0, 1, 2, 3]}, TypeError, "ids must be a tensor; got list"),
        ({"ids": Z[:, 0].numpy()}, TypeError, "ids must be a tensor; got ndarray"),
        ({"ids": Z[:, 0].to(torch.complex64)}, ValueError, r"integers \[4\]"),
        ({"queue": (Z, torch.arange(4))}, TypeError, "queue must be a tensor; got tuple"),
        ({"guide": Z}, TypeError, r"guide must be a pair"),
        ({"guide": (Z,)}, TypeError, r"guide must be a pair"),
        ({"guide": (Z, None)}, TypeError, r"guide\[1\] must be a tensor; got NoneType"),
        ({"guide": (Z[0, 0], Z[0, 0])}, ValueError, r"guide\[0\] must be"),
        ({"queue": Z, "layout": "symmetric"}, ValueError, "takes no queue"),
        (
            {"queue": ce.Columns(Z, ids=torch.arange(3)), "ids": torch.arange(4)},
            ValueError,
            r"of queue must be .* \[4\]",
        ),
        ({"queue": Z[:, :2]}, ValueError, r"\[K, 3\]"),
        ({"queue": Z.long()}, ValueError, "floating-point"),
        ({"queue": ce.NegativeQueue(4, 2)}, ValueError, r"\[K, 3\]"),
        ({"queue": Z[:0], "in_batch_negatives": False, "layout": "one_way"}, ValueError, "is no queue"),
        ({"queue": Z[:0, :2]}, ValueError, r"\[K, 3\]"),
        ({"queue": Z[0, :0]}, ValueError, r"\[K, 3\]"),
        ({"negatives": Z[:0], "layout": "one_way"}, ValueError, "K, n >= 1"),
        ({"negatives": torch.randn(4, 0, 3), "layout": "one_way"}, ValueError, "K, n >= 1"),
        ({"negatives": Z}, ValueError, "one_way"),
        ({"negatives": Z[:, :2], "layout": "one_way"}, ValueError, r"\[K, 3\] or \[4, n, 3\]"),
        ({"negatives": torch.randn(5, 2, 3), "layout": "one_way"}, ValueError, r"\[4, n, 3\]"),
        ({"negatives": Z.double(), "layout": "one_way"}, TypeError, "negatives must be torch.float32"),
        ({"in_batch_negatives": False}, ValueError, "one_way"),
        ({"in_batch_negatives": False, "layout": "one_way"}, ValueError, "queue or explicit negatives"),
        (
            {"in_batch_negatives": False, "layout": "one_way", "queue": Z, "z2": torch.randn(6, 3)},
            ValueError,
            r"z2 must be \[4, 3\]",
        ),
        ({"backend": "numpy"}, ValueError, "numpy"),
        (
            {"operand_dtype": torch.float64},
            ValueError,
            "torch.float16, torch.bfloat16, 'fp16x3', 'bf16x3' or None; got torch.float64",
        ),
        ({"operand_dtype": "fp16"}, ValueError, "got 'fp16'"),
        ({"z1": Z.half(), "z2": Z.half(), "operand_dtype": torch.bfloat16}, ValueError, "torch.float16 or None"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES[:1] + LOSSES[3:4], ids=lambda x: x.name)
def test_every_loss_refuses(loss, arguments, error, says):
    with pytest.raises(error, match=says):
        loss.function(**({"z1": Z, "z2": Z} | loss.parameters | arguments))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ce.fused_debiased_loss(Z, Z, tau_plus=1.0), r"\[0, 1\); got 1.0"),
        (lambda: ce.fused_debiased_loss(Z, Z, tau_plus=-0.1), "got -0.1"),
        (lambda: ce.fused_debiased_loss(Z, Z, positives=Z), r"\[M, 4, 3\]"),
        (lambda: ce.fused_debiased_loss(Z, Z, positives=torch.randn(0, 4, 3)), "M >= 1"),
        (lambda: ce.fused_hard_negative_loss(Z, Z, tau_plus=2.0), r"\[0, 1\)"),
        (lambda: ce.fused_hard_negative_loss(Z, Z, beta=-1.0), "beta"),
        (lambda: ce.fused_hard_negative_loss(Z, Z, beta=float("inf")), "finite"),
        (
            lambda: ce.fused_decoupled_loss(Z, Z, positive_weight=torch.ones(3)),
            r"must be floating-point \[4\]",
        ),
        (lambda: ce.DebiasedLoss(tau_plus=1.5), r"\[0, 1\)"),
    ],
)
def test_parameters_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ce.fused_debiased_loss(Z, Z, tau_plus="0.1"), "tau_plus must be a number; got str"),
        # a tensor would be taken as a constant on one road and differentiated in part on another
        (lambda: ce.fused_debiased_loss(Z, Z, tau_plus=torch.tensor(0.1)), "tau_plus must be a number; got torch"),
        (lambda: ce.fused_hard_negative_loss(Z, Z, beta="1"), "beta must be a number"),
        (lambda: ce.fused_bayesian_loss(Z, Z, alpha=None), "alpha must be a number"),
        (lambda: ce.fused_debiased_loss(Z, Z, positives=[Z, Z]), "positives must be a tensor; got list"),
        (lambda: ce.fused_decoupled_loss(Z, Z, positive_weight=[1.0] * 4), "positive_weight must be a tensor"),
        (lambda: ce.fused_decoupled_loss(None, Z, positive_weight=Z[:, 0]), "z1 must be a tensor"),
        (lambda: ce.fused_row_loss(ce.Debiased, Z, Z), "row_loss must be a RowLoss"),
        (lambda: ce.RowLossModule("infonce"), "row_loss must be a RowLoss"),
        (lambda: ce.fused_supcon_loss(Z, [0, 0, 1, 1]), "labels must be a tensor; got list"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), threshold="0.7"), "threshold must be a number"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), support=[Z]), "support must be a tensor"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), queue=Z.tolist()), "queue must be a tensor"),
        (lambda: ce.fused_soft_target_loss(Z, Z, Z, teacher_temperature="1"), "teacher_temperature must be a number"),
        (lambda: ce.LogitScale("0.07"), "temperature must be a number"),
        (lambda: ce.NegativeQueue(4, 3).enqueue(Z.tolist()), "keys must be a tensor"),
        (lambda: ce.NegativeQueue(4, 3).enqueue(Z, [0, 1, 2, 3]), "ids must be a tensor"),
        (lambda: ce.explain([1.0]), "z1 must be a tensor"),
        (lambda: ce.estimate_memory(8, 8, dtype=torch.int32), "dtype must be float16"),
        (lambda: ce.estimate_alpha(Z.tolist(), torch.arange(4)), "features must be a tensor"),
        (lambda: ce.estimate_alpha(Z, [0, 0, 1, 1]), "labels must be a tensor"),
    ],
)
def test_what_is_no_tensor_or_number_is_named(call, says):
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ce.fused_supcon_loss(Z, torch.arange(4).to(torch.complex64)), "integers"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), top_k=2.5), "top_k must be an integer"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), threshold=float("nan")), "threshold"),
        (lambda: ce.fused_false_negative_loss(torch.stack([Z, Z]), queue=Z.long()), "queue must be floating-point"),
        (lambda: ce.fused_decoupled_loss(Z, Z, positive_weight=torch.arange(4)), "floating-point"),
        (lambda: ce.LogitScale(0.0), "1/temperature"),
        (lambda: ce.NegativeQueue(2.5, 3), "integers >= 1"),
        (lambda: ce.NegativeQueue(4, 3).enqueue(Z.long()), "keys must be floating-point"),
        (lambda: ce.estimate_alpha(Z * float("nan"), torch.arange(4) // 2), "finite"),  # once 1.25, an impossible AUC
        (lambda: ce.linear_alpha(float("nan")), "step >= 0"),
        (lambda: ce.explain(Z, Z[:, :2]), r"\[B, D\]"),
    ],
)
def test_values_that_used_to_slip_through(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
@given(
    b=st.integers(1, 40),
    more=st.integers(0, 5),
    d=st.integers(1, 40),
    k=st.integers(1, 20),
    layout=st.sampled_from(["two_view", "one_way", "symmetric"]),
    with_queue=st.booleans(),
    log_t=st.floats(-2.2, 1.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_and_temperature(loss, b, more, d, k, layout, with_queue, log_t, seed):
    """On the automatic backend, against the reference in float64: no shape crashes, none is wrong."""
    torch.manual_seed(seed)
    z1, z2 = torch.randn(b, d, dtype=torch.float64), torch.randn(b + (more if layout == "one_way" else 0), d).double()
    call = loss.parameters | loss.vectors(z1) | {"layout": layout, "temperature": 10**log_t}
    if with_queue and layout != "symmetric":
        call["queue"] = torch.randn(k, d, dtype=torch.float64)
    ours, expected = ([z1.clone().requires_grad_(), z2.clone().requires_grad_()] for _ in range(2))
    value = loss.function(*ours, **call)
    truth = loss.function(*expected, backend="reference", **call)
    value.backward()
    truth.backward()
    # near the debiasing floor the loss is a small difference of large sums: the comparison allows for that
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-10)
    for a, c in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.grad, c.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: ce.Columns(Z.tolist()), TypeError, "features of Columns must be a tensor; got list"),
        (lambda: ce.Columns(Z, ids=[0, 1, 2, 3]), TypeError, "ids of Columns must be a tensor; got list"),
        (lambda: ce.Columns(Z, guide=1.0), TypeError, "guide of Columns must be a tensor; got float"),
        (lambda: ce.Columns(ce.NegativeQueue(4, 3), ids=torch.arange(4)), ValueError, "holds its own ids"),
        (lambda: ce.Guide(Z, None), TypeError, r"guide\[1\] must be a tensor; got NoneType"),
        (lambda: ce.Guide(Z, Z, "0.1"), TypeError, "margin must be a number"),
        (lambda: ce.Guide(Z, Z, float("inf")), ValueError, "margin must be finite"),
        (lambda: ce.Guide(Z, Z, float("nan")), ValueError, "margin must be finite"),
        (lambda: ce.Guide(Z, Z, 0.1, "relative"), TypeError, "relative must be True or False; got 'relative'"),
    ],
)
def test_columns_and_guides_refuse_what_they_cannot_be(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "call",
    [
        lambda q: ce.fused_false_negative_loss(torch.stack([Z, Z]), queue=q),
        lambda q: ce.fused_self_labeling_loss(Z, Z, q),
        lambda q: ce.fused_soft_target_loss(Z, Z, Z, teacher_temperature=0.1, queue=q),
    ],
)
def test_losses_without_a_guide_refuse_its_features(call):
    with pytest.raises(ValueError, match="takes queue as they are: no guide"):
        call(ce.Columns(Z, guide=Z))
