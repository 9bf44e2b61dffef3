"""Soft targets: the definition, the error rule, what is constant, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import contrastive_ext as ce
from accuracy import assert_as_accurate_as_dense, evaluate, on_rounded_operands
from rows import INPUTS

loss_of = ce.fused_soft_target_loss


def _vectors(n=6, m=9, d=4, dtype=torch.float64, device="cpu", inputs="random"):
    """queries, keys, teacher."""
    queries, teacher = INPUTS[inputs](n, d, torch.float64)
    keys, _ = INPUTS[inputs](m, d, torch.float64)
    return [x.to(device, dtype) for x in (queries, keys, teacher)]


def test_matches_its_definition(run):
    backend, device = run
    queries, keys, teacher = _vectors(device=device)
    queue = F.normalize(torch.randn(5, 4, dtype=torch.float64, device=device))
    queries.requires_grad_()
    loss, stats = loss_of(
        queries, keys, teacher, 0.3, teacher_temperature=0.1, queue=queue, backend=backend, return_stats=True
    )
    everything = torch.cat([F.normalize(keys), queue])
    targets = (F.normalize(teacher) @ everything.T / 0.1).softmax(1)
    logits = F.normalize(queries) @ everything.T / 0.3
    expected = F.cross_entropy(logits, targets)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(torch.autograd.grad(loss, queries), torch.autograd.grad(expected, queries), **close)
    entropy = torch.special.entr(targets).sum(1).mean()
    torch.testing.assert_close(stats.teacher_entropy, entropy, **close)
    torch.testing.assert_close(stats.divergence, F.kl_div(logits.log_softmax(1), targets, reduction="batchmean"))
    torch.testing.assert_close(stats.student_entropy, torch.special.entr(logits.softmax(1)).sum(1).mean(), **close)
    torch.testing.assert_close(stats.teacher_confidence, targets.amax(1).mean(), **close)


def test_reference_reports_the_same(run):
    backend, device = run
    vectors = _vectors(device=device)
    results = [
        loss_of(*vectors, teacher_temperature=0.04, backend=b, return_stats=True) for b in (backend, "reference")
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-13)
    assert results[0][1].to_dict() == pytest.approx(results[1][1].to_dict(), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inputs", INPUTS)
def test_error_rule(run, inputs, dtype):
    backend, device = run
    queries, keys, teacher = _vectors(40, 70, 16, dtype, device, inputs)
    options = {"teacher_temperature": 0.05, "temperature": 0.1, "keys": keys, "teacher": teacher}
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    leaves = {"queries": queries}
    ours = evaluate(loss_of, leaves, upstream, backend=backend, **options)
    dense = evaluate(loss_of, leaves, upstream, backend="reference", **options)
    exact = on_rounded_operands(loss_of, True, ("queries", "keys", "teacher"))
    truth = evaluate(exact, {"queries": queries.double()}, upstream, dtype=dtype, **options)
    length = queries.double().norm(dim=1)
    terms = {"queries": upstream / 0.1 / len(queries) / length[length > 0].min().item()}
    if backend == "triton" and dtype in (
        torch.float16,
        torch.bfloat16,
    ):  # the targets' means come from 16-bit exponentials
        assert (ours.loss.double() - truth.loss).abs() <= torch.finfo(dtype).eps / 0.1
        ours = type(ours)(truth.loss, ours.grads)
    assert_as_accurate_as_dense(ours, dense, truth, 20.0, terms, dtype)


def test_gradcheck_with_a_learnable_temperature(run):
    backend, device = run
    queries, keys, teacher = _vectors(3, 5, 3, device=device)

    def function(queries, temperature):
        return loss_of(queries, keys, teacher, temperature, teacher_temperature=0.2, reduction="none", backend=backend)

    temperature = torch.tensor(0.4, dtype=torch.float64, device=device)
    leaves = [x.clone().requires_grad_() for x in (queries, temperature)]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_teacher_and_keys_are_constant(backend):
    queries, keys, teacher = (x.requires_grad_() for x in _vectors())
    loss_of(queries, keys, teacher, teacher_temperature=0.1, backend=backend).backward()
    assert queries.grad.ne(0).any() and keys.grad is None and teacher.grad is None


def test_a_student_like_its_teacher_has_no_gradient(run):
    backend, device = run
    queries, keys, _ = _vectors(device=device)
    x = queries.clone().requires_grad_()
    loss, stats = loss_of(x, keys, queries, 0.1, teacher_temperature=0.1, backend=backend, return_stats=True)
    loss.backward()
    assert x.grad.abs().max() <= 1e-14 and stats.divergence.abs() <= 1e-13


def test_second_derivatives():
    queries, keys, teacher = _vectors(3, 4, 3)
    queries.requires_grad_()
    options = {"teacher_temperature": 0.3, "temperature": 0.7}
    assert torch.autograd.gradgradcheck(lambda x: loss_of(x, keys, teacher, backend="reference", **options), queries)
    loss = loss_of(queries, keys, teacher, backend="torch", **options)
    (grad,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()


def test_keys_of_a_queue(run):
    backend, device = run
    queries, keys, teacher = _vectors(device=device)
    queue = ce.NegativeQueue(13, 4, dtype=torch.float64, device=device)
    call = {"teacher_temperature": 0.1, "backend": backend}
    for name in (backend, "reference"):  # no key at all: nothing to learn
        x = queries.clone().requires_grad_()
        loss = loss_of(x, queue, teacher, teacher_temperature=0.1, backend=name)
        loss.backward()
        assert loss.item() == 0 and x.grad.eq(0).all()
    queue.enqueue(F.normalize(keys))
    torch.testing.assert_close(loss_of(queries, queue, teacher, **call), loss_of(queries, keys, teacher, **call))


def test_module_equals_function():
    vectors = _vectors()
    module = ce.SoftTargetLoss(0.2, teacher_temperature=0.05)
    assert torch.equal(module(*vectors), loss_of(*vectors, 0.2, teacher_temperature=0.05))
    assert torch.equal(
        module(*vectors, reduction="sum"), loss_of(*vectors, 0.2, teacher_temperature=0.05, reduction="sum")
    )


Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"queries": [1.0]}, TypeError, "queries must be a tensor; got list"),
        ({"teacher": Z[:3]}, ValueError, r"teacher must be \[N, D\] like queries; got \[3, 3\]"),
        ({"teacher": Z.double()}, TypeError, "queries and teacher must share dtype"),
        ({"keys": Z[:, :2]}, ValueError, r"keys must be \[., 3\]"),
        ({"keys": Z[:0]}, ValueError, "not empty"),
        ({"keys": ce.NegativeQueue(4, 2)}, ValueError, r"keys must be floating-point \[K, 3\]"),
        ({"queue": Z[:, :2]}, ValueError, r"queue must be floating-point \[K, 3\]"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be > 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0"),
        ({"reduction": "average"}, ValueError, "mean, sum, none"),
        ({"backend": "fastest"}, ValueError, "auto"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    with pytest.raises(error, match=says):
        loss_of(**({"queries": Z, "keys": Z, "teacher": Z, "teacher_temperature": 0.1} | arguments))
