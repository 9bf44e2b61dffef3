"""Modules equal their functions; the learnable scale stays inside its bound and can come back."""

from __future__ import annotations

import math

import pytest
import torch

import contrastive_ext as ce
from rows import LOSSES, RANKED, random_pairs


@pytest.mark.parametrize("loss", LOSSES + RANKED, ids=lambda x: x.name)
def test_module_equals_function(loss):
    z1, z2 = random_pairs(6, 4)
    module = loss.module(0.3, **loss.parameters, layout="one_way")
    vectors = loss.vectors(z1)
    assert torch.equal(
        module(z1, z2, **vectors), loss.function(z1, z2, 0.3, layout="one_way", **loss.parameters, **vectors)
    )
    assert loss.module.__name__ in repr(module)


def test_call_overrides_construction():
    z1, z2 = random_pairs(6, 4)
    module = ce.InfoNCELoss(0.3, reduction="sum")
    assert torch.equal(module(z1, z2, temperature=0.7), ce.fused_infonce_loss(z1, z2, 0.7, reduction="sum"))
    scale = torch.tensor(2.0)
    assert torch.equal(
        module(z1, z2, logit_scale=scale), ce.fused_infonce_loss(z1, z2, logit_scale=scale, reduction="sum")
    )


def test_a_call_replaces_the_other_name_of_the_temperature_too():
    z1, z2 = random_pairs(6, 4)
    module = ce.InfoNCELoss(logit_scale=20.0)
    assert torch.equal(module(z1, z2, temperature=0.7), ce.fused_infonce_loss(z1, z2, 0.7))
    assert torch.equal(module(z1, z2, logit_scale=None), module(z1, z2))  # none given: the module's own
    assert torch.equal(ce.InfoNCELoss(0.7)(z1, z2, logit_scale=None), ce.fused_infonce_loss(z1, z2, 0.7))
    assert "temperature" not in repr(module)
    views = torch.stack([z1, z2])
    found = ce.FalseNegativeLoss(logit_scale=20.0)(views, temperature=0.7)
    assert torch.equal(found, ce.fused_false_negative_loss(views, 0.7))


def test_module_carries_its_queue():
    module = ce.DebiasedLoss(queue=ce.NegativeQueue(5, 4))
    module.queue.enqueue(torch.randn(5, 4))
    assert {"queue.data", "queue.ids", "queue.pointer", "queue.count"} <= set(module.state_dict())
    z1, z2 = random_pairs(6, 4)
    assert torch.equal(module(z1, z2), ce.fused_debiased_loss(z1, z2, queue=module.queue))
    assert module.to(torch.float64).queue.data.dtype == torch.float64


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        ce.InfoNCELoss(temprature=0.1)
    with pytest.raises(TypeError, match="temprature"):
        ce.fused_infonce_loss(*random_pairs(2, 2), temprature=0.1)
    with pytest.raises(TypeError, match="layouts"):
        ce.InfoNCELoss()(*random_pairs(2, 2), layouts="one_way")


def test_scale_is_clamped_and_recovers():
    scale = ce.LogitScale(temperature=0.011, max_scale=100.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    (-scale()).backward()  # wants a larger scale
    optimizer.step()
    assert scale().item() == pytest.approx(100.0)
    optimizer.zero_grad()
    scale().backward()  # wants a smaller one: a clamp inside the graph would give no gradient here
    assert scale.log_scale.grad.item() > 0
    with pytest.raises(ValueError, match="max_scale"):
        ce.LogitScale(temperature=0.001)


def test_scale_learns_through_a_loss():
    scale, (z1, z2) = ce.LogitScale(0.5), random_pairs(8, 4)
    ce.InfoNCELoss(layout="symmetric")(z1, z2, logit_scale=scale()).backward()
    temperature = torch.tensor(0.5, requires_grad=True)
    ce.fused_infonce_loss(z1, z2, temperature, layout="symmetric").backward()
    # d/d log(1/t) = -t d/dt
    assert scale.log_scale.grad.item() == pytest.approx(-0.5 * temperature.grad.item(), rel=1e-5)
    assert math.isfinite(temperature.grad.item())


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: ce.InfoNCELoss(-1.0), ValueError, "temperature must be > 0"),
        (lambda: ce.InfoNCELoss("0.5"), TypeError, "temperature must be a number"),
        (lambda: ce.InfoNCELoss(0.5, logit_scale=2.0), ValueError, "not both"),
        (lambda: ce.InfoNCELoss(logit_scale=torch.zeros(3)), ValueError, "0-d"),
        (lambda: ce.InfoNCELoss(layout="three_view"), ValueError, "layout must be one of"),
        (lambda: ce.InfoNCELoss(reduction="average"), ValueError, "reduction must be one of"),
        (lambda: ce.InfoNCELoss(backend="numpy"), ValueError, "backend must be one of"),
        (lambda: ce.InfoNCELoss(guide=torch.ones(2, 2)), TypeError, "guide must be a pair"),
        (lambda: ce.InfoNCELoss(operand_dtype="fp16"), ValueError, "operand_dtype"),
        (lambda: ce.InfoNCELoss(queue=[[1.0]]), TypeError, "queue must be a tensor"),
        (lambda: ce.DebiasedLoss(tau_plus=1.0), ValueError, r"\[0, 1\)"),
        (lambda: ce.BayesianLoss(ranks="some"), ValueError, "ranks must be one of"),
        (lambda: ce.SupConLoss(0.0), ValueError, "temperature must be > 0"),
        (lambda: ce.SupConLoss(positives="both"), ValueError, "positives must be one of"),
        (lambda: ce.SupConLoss(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: ce.FalseNegativeLoss(mode="remove"), ValueError, "mode must be one of"),
        (lambda: ce.FalseNegativeLoss(aggregate="sum"), ValueError, "aggregate must be one of"),
        (lambda: ce.FalseNegativeLoss(top_k=0), ValueError, "top_k must be an integer"),
        (lambda: ce.FalseNegativeLoss(threshold="0.7"), TypeError, "threshold must be a number"),
        (lambda: ce.FalseNegativeLoss(top_k=None, threshold=None), ValueError, "cannot both be None"),
        (lambda: ce.FalseNegativeLoss(queue=[1.0]), TypeError, "queue must be a tensor"),
        (lambda: ce.SelfLabelingLoss(-0.2), ValueError, "temperature must be > 0"),
        (lambda: ce.SelfLabelingLoss(label_temperature=0.0), ValueError, "label_temperature must be > 0"),
        (lambda: ce.SelfLabelingLoss(mu=-1.0), ValueError, "mu must be >= 0"),
        (lambda: ce.SelfLabelingLoss(mu="1"), TypeError, "mu must be a number"),
        (lambda: ce.SelfLabelingLoss(lam=1.5), ValueError, "lam"),
        (lambda: ce.SoftTargetLoss(teacher_temperature=0.0), ValueError, "teacher_temperature must be > 0"),
        (lambda: ce.SoftTargetLoss(teacher_temperature=0.1, backend="numpy"), ValueError, "backend must be one of"),
    ],
)
def test_what_no_batch_makes_right_is_refused_at_construction(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_learned_temperature_may_be_given_at_construction():
    z1, z2 = random_pairs(6, 4)
    temperature = torch.nn.Parameter(torch.tensor([0.3]))
    ce.InfoNCELoss(temperature)(z1, z2).backward()
    assert temperature.grad.isfinite().all()
    assert temperature.grad.ne(0).all()


FUNCTIONS = [loss.function for loss in LOSSES + RANKED]
MODULES = [loss.module for loss in LOSSES + RANKED]


@pytest.mark.parametrize("function", dict.fromkeys(FUNCTIONS), ids=lambda f: f.__name__)
def test_a_mistyped_keyword_names_the_function(function):
    z1, z2 = random_pairs(3, 2)
    for typo in ("tau", "temprature", "row_loss"):
        with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument '{typo}'"):
            function(z1, z2, **{typo: 0.1})


@pytest.mark.parametrize("module", dict.fromkeys(MODULES), ids=lambda m: m.__name__)
def test_a_mistyped_keyword_names_the_module(module):
    z1, z2 = random_pairs(3, 2)
    for call in (lambda: module(tau=0.1), lambda: module()(z1, z2, tau=0.1)):
        with pytest.raises(TypeError, match=rf"^{module.__name__}\(\) got an unexpected keyword argument 'tau'"):
            call()


def test_a_mistyped_keyword_names_modules_with_a_signature_of_their_own():
    z1, z2 = random_pairs(3, 2)
    calls = {
        "FalseNegativeLoss": lambda: ce.FalseNegativeLoss()(torch.stack([z1, z2]), topk=3),
        "SupConLoss": lambda: ce.SupConLoss()(z1, torch.arange(3), topk=3),
        "SelfLabelingLoss": lambda: ce.SelfLabelingLoss()(z1, z2, topk=3),
        "SoftTargetLoss": lambda: ce.SoftTargetLoss(teacher_temperature=0.1)(z1, z2, z2, topk=3),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'topk'"):
            call()
    for made in (ce.FalseNegativeLoss, ce.SupConLoss):
        with pytest.raises(TypeError, match=rf"^{made.__name__}\(\) got an unexpected keyword argument 'topk'"):
            made(topk=3)


def test_positives_are_for_losses_that_correct_with_them():
    """InfoNCE once took debiasing positives and ignored them."""
    z1, z2 = random_pairs(3, 2)
    positives = torch.stack([z1, z2])
    for call in (ce.fused_infonce_loss, ce.InfoNCELoss(), ce.fused_bayesian_loss, ce.DecoupledLoss()):
        with pytest.raises(TypeError, match="positives"):
            call(z1, z2, positives=positives)
    assert torch.equal(
        ce.DebiasedLoss()(z1, z2, positives=positives), ce.fused_debiased_loss(z1, z2, positives=positives)
    )


def test_a_scale_is_no_temperature():
    with pytest.raises(ValueError, match=r"14.3 looks like a scale, give its temperature: LogitScale\(1 / 14.3\)"):
        ce.LogitScale(14.3)
    assert ce.LogitScale(1 / 14.3)().item() == pytest.approx(14.3)
    assert ce.LogitScale(2.0)().item() == pytest.approx(0.5)


def test_views_come_first():
    views, labels = torch.randn(4, 2, 3), torch.tensor([0, 1, 0, 1])  # [B, V, D]
    for call in (ce.fused_supcon_loss, lambda x, y: ce.fused_false_negative_loss(x, labels=y)):
        for y in (labels, labels[:, None]):
            with pytest.raises(ValueError, match=r"views first.*\.transpose\(0, 1\)"):
                call(views, y)
        call(views.transpose(0, 1), labels)
    for function in (ce.fused_supcon_loss, ce.fused_false_negative_loss):
        assert "[V, B, D], views first" in function.__doc__.splitlines()[0]
