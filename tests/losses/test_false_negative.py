"""False-negative cancellation: the authors' values, every mode against the dense steps of the paper, hard cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import contrastive_ext as ce
import golden_files
from accuracy import assert_as_accurate_as_dense, evaluate
from contrastive_ext.batch import detection
from contrastive_ext.problem.pairs import NO_COLUMN_ID, UNFILLED
from rows import INPUTS

fused = ce.fused_false_negative_loss


def _golden(family: str) -> list[tuple[dict, dict[str, Tensor]]]:
    return [(case, golden_files.load(family, case)) for case in golden_files.cases(family)]


def _assert_close(ours: Tensor, expected: Tensor) -> None:
    assert (ours.detach().cpu() - expected).abs().max().item() <= 1e-9 * expected.abs().max().item()


ALL = [("reference", torch.device("cpu"))]


@pytest.mark.parametrize("case, golden", _golden("fnc_batch"), ids=lambda x: x.get("case", "") if "V" in x else "")
@pytest.mark.parametrize("how", ["backend", "reference"])
def test_matches_the_released_code(run, how, case, golden):
    backend, device = run if how == "backend" else ALL[0]
    hidden = golden["hidden"].to(device).requires_grad_()
    views = hidden.view(case["V"], case["B"], case["d"])
    options = {"top_k": case["fn_topk"], "threshold": case["fn_threshold"], "backend": backend}
    loss = 2 * fused(views, case["t"], **options)  # the released total counts every pair of views twice
    _assert_close(loss, golden["loss"])
    _assert_close(torch.autograd.grad(loss, hidden)[0], golden["grad"])


@pytest.mark.parametrize("case, golden", _golden("fnc_memory"), ids=lambda x: x.get("case", "") if "V" in x else "")
@pytest.mark.parametrize("how", ["backend", "reference"])
def test_matches_the_released_code_with_memory(run, how, case, golden):
    backend, device = run if how == "backend" else ALL[0]
    hidden = golden["hidden"].to(device).requires_grad_()
    shape = case["V"], case["B"], case["d"]
    memory = golden["memory"].to(device)
    keys, older = memory[: case["V"] * case["B"]].view(shape), memory[case["V"] * case["B"] :]
    options = {"top_k": case["fn_topk"], "threshold": case["fn_threshold"], "backend": backend}
    loss = 2 * fused(hidden.view(shape), case["t"], keys=keys, queue=older, **options)
    _assert_close(loss, golden["loss"])
    _assert_close(torch.autograd.grad(loss, hidden)[0], golden["grad"])


@pytest.mark.parametrize("case, golden", _golden("fnc_paper"), ids=lambda x: x.get("case", "") if "S" in x else "")
@pytest.mark.parametrize("how", ["backend", "reference"])
def test_matches_the_paper(run, how, case, golden):
    backend, device = run if how == "backend" else ALL[0]
    z1, z2 = (golden[name].to(device).requires_grad_() for name in ("z1", "z2"))
    support = golden["support"].to(device) if case["S"] else None
    options = {"support": support, "mode": case["mode"], "aggregate": case["aggregate"], "backend": backend}
    options |= {"top_k": case["topk"], "threshold": case["threshold"]}
    rows = fused(torch.stack([z1, z2]), case["t"], normalize=False, reduction="none", **options)
    _assert_close(rows, golden["row_loss"])
    _assert_close(rows.mean(), golden["loss"])
    for ours, expected in zip(torch.autograd.grad(rows.mean(), (z1, z2)), ("grad_z1", "grad_z2"), strict=True):
        _assert_close(ours, golden[expected])


def _views(v: int, b: int, d: int, dtype=torch.float64, device="cpu", kind="random") -> Tensor:
    z = torch.stack([INPUTS[kind](b, d, torch.float64)[0] + 0.1 * torch.randn(b, d) for _ in range(v)])
    return z.to(device, dtype)


USAGES = {
    "two views": lambda z: (z[:2], {}),
    "four views": lambda z: (z, {}),
    "support": lambda z: (z[:2], {"support": z[2:] + 0.2}),
    "mean of support": lambda z: (z[:2], {"support": z[1:] - 0.2, "aggregate": "mean"}),
    "keys": lambda z: (z[:2], {"keys": z[2:]}),
    "keys and queue": lambda z: (z[:3], {"keys": z[1:], "queue": F.normalize(z[0].flip(1)[:9], dim=1)}),
    "queue": lambda z: (z[:2], {"queue": F.normalize(z[3].flip(0), dim=1)}),
    "part-filled queue": lambda z: (z[:2], {"queue": _part_filled(z)}),
}
CRITERIA = {
    "both": {"top_k": 3, "threshold": 0.3},
    "top_k": {"top_k": 2, "threshold": None},
    "threshold": {"top_k": None, "threshold": 0.2},
    "endless lists": {"top_k": 10**6, "threshold": 0.1},
}


def _part_filled(z: Tensor) -> ce.NegativeQueue:
    queue = ce.NegativeQueue(11, z.shape[-1], dtype=z.dtype if z.dtype == torch.float64 else torch.float32).to(z.device)
    # no copies of a view: the order of equal scores would be a matter of rounding
    queue.enqueue(F.normalize(z[0, :6].to(queue.data.dtype) + 0.1, dim=1))
    return queue


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
@pytest.mark.parametrize("criteria", CRITERIA)
@pytest.mark.parametrize("usage", USAGES)
def test_every_usage_matches_the_dense_steps(run, usage, criteria, mode):
    backend, device = run
    views, options = USAGES[usage](_views(4, 19, 8, device=device))
    options |= CRITERIA[criteria] | {"mode": mode, "reduction": "none"}
    inputs = {"views": views, "temperature": torch.tensor(0.2, dtype=torch.float64, device=device)}
    ours = evaluate(fused, inputs, 1.0, backend=backend, **options)
    expected = evaluate(fused, inputs, 1.0, backend="reference", **options)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-10, atol=1e-11)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-9, atol=1e-10)
    ours, expected = (
        fused(**inputs, backend=name, return_stats=True, labels=torch.arange(19, device=device) % 4, **options)[1]
        for name in (backend, "reference")
    )
    assert ours.to_dict() == pytest.approx(expected.to_dict(), nan_ok=True)


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_error_rule(run, kind, dtype, mode):
    backend, device = run
    # few features: scores are far apart, so that every precision detects the same false negatives
    unit = F.normalize(_views(2, 24, 24, kind=kind), dim=-1).to(dtype)
    inputs = {"views": unit.to(device)}
    options = {"temperature": 0.1, "mode": mode, "top_k": 2, "threshold": None, "normalize": False}
    ours = evaluate(fused, inputs, 1.0, backend=backend, **options)
    dense = evaluate(fused, inputs, 1.0, backend="reference", **options)
    truth = evaluate(fused, {"views": unit.double().to(device)}, 1.0, backend="reference", **options)
    assert_as_accurate_as_dense(ours, dense, truth, 10.0, {}, dtype)


@pytest.mark.parametrize("criteria", CRITERIA)
def test_ties_take_the_lower_column(run, criteria):
    """Duplicates everywhere: scores are equal exactly, on every backend."""
    backend, device = run
    z = torch.randint(-1, 2, (2, 12, 3), device=device).double()
    options = {"mode": "eliminate", "normalize": False, "reduction": "none"} | CRITERIA[criteria]
    ours = fused(z, 0.7, backend=backend, **options)
    torch.testing.assert_close(ours, fused(z, 0.7, backend="reference", **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criteria", [{"top_k": 100, "threshold": None}, {"top_k": None, "threshold": -2.0}])
def test_everything_cancelled_costs_nothing(run, criteria):
    backend, device = run
    views = _views(2, 6, 4, device=device).requires_grad_()
    loss, stats = fused(views, mode="eliminate", return_stats=True, backend=backend, **criteria)
    loss.backward()
    assert loss.item() == 0.0
    assert views.grad.eq(0).all()
    assert stats.to_dict() == pytest.approx(
        {"cancelled_fraction": 1.0, "detected": 10.0, "empty_rows": 12.0}
        | {"positive_similarity": stats.positive_similarity.item()}
    )


def test_nothing_detected_is_infonce(run):
    backend, device = run
    views = _views(2, 9, 5, device=device)
    for mode in ("attract", "eliminate"):
        loss = fused(views, 0.3, mode=mode, threshold=1.5, backend=backend)
        torch.testing.assert_close(loss, ce.fused_infonce_loss(*views, 0.3, backend=backend), rtol=1e-13, atol=0)


def test_one_image_has_nothing_to_cancel(run):
    backend, device = run
    views = _views(2, 1, 5, device=device).requires_grad_()
    loss = fused(views, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert views.grad.eq(0).all()


def test_bad_numbers_reach_the_loss(run):
    backend, device = run
    views = _views(2, 9, 5, device=device)
    keys = _views(2, 9, 5, device=device)
    keys[1, 4, 2] = torch.nan  # of a column that scores highest, were it a number
    for mode in ("attract", "eliminate"):
        assert fused(views, keys=keys, mode=mode, backend=backend).isnan()


def test_labels_measure_the_detection(run):
    backend, device = run
    labels = torch.arange(16, device=device) % 4
    centers = F.normalize(torch.randn(4, 32, dtype=torch.float64, device=device))
    views = centers[labels] + 0.05 * torch.randn(2, 16, 32, dtype=torch.float64, device=device) / 32**0.5
    for top_k, recall in ((6, 1.0), (3, 0.5)):  # 3 other images of the class, 2 views each
        _, stats = fused(views, labels=labels, top_k=top_k, return_stats=True, backend=backend)
        assert stats.to_dict()["precision"] == 1.0
        assert stats.to_dict()["recall"] == pytest.approx(recall)
    queue = ce.NegativeQueue(8, 32, dtype=torch.float64, device=device)
    queue.enqueue(centers, torch.arange(4, device=device))
    queue.enqueue(centers[:2])  # labels unknown: neither right nor wrong
    _, stats = fused(views, labels=labels, top_k=8, queue=queue, return_stats=True, backend=backend)
    assert stats.to_dict()["precision"] == 1.0
    assert stats.to_dict()["recall"] == 1.0


def test_gradcheck(run):
    backend, device = run
    views = _views(2, 6, 3, device=device).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)
    for mode in ("attract", "eliminate"):
        for criteria in ("top_k", "threshold"):
            options = CRITERIA[criteria] | {"mode": mode, "backend": backend}
            assert torch.autograd.gradcheck(lambda z, s, o=options: fused(z, logit_scale=s, **o), (views, scale))


@pytest.mark.parametrize("criteria", ["both", "threshold"])
def test_second_derivative_raises_and_the_reference_has_one(run, criteria):
    backend, device = run
    views = _views(2, 5, 3, device=device).requires_grad_()
    (grad,) = torch.autograd.grad(fused(views, backend=backend, **CRITERIA[criteria]), views, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()
    options = CRITERIA[criteria] | {"backend": "reference"}
    assert torch.autograd.gradgradcheck(lambda z: fused(z, **options), (views,))


def test_module_equals_function():
    views = _views(2, 7, 4, torch.float32)
    module = ce.FalseNegativeLoss(0.3, mode="eliminate", top_k=4, queue=ce.NegativeQueue(5, 4))
    module.queue.enqueue(F.normalize(torch.randn(5, 4), dim=1))
    expected = fused(views, 0.3, mode="eliminate", top_k=4, queue=module.queue)
    assert torch.equal(module(views), expected)
    assert not torch.equal(module(views, mode="attract"), expected)
    assert "queue.data" in module.state_dict()
    assert "eliminate" in repr(module)
    with pytest.raises(TypeError, match="topk"):
        ce.FalseNegativeLoss(topk=4)


Z = torch.ones(2, 3, 4)


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
def test_vectors_that_change_before_the_backward(run, mode):
    """A threshold alone is asked again in the backward: of vectors used as given, but not as they are by then."""
    backend, device = run
    views = torch.randn(2, 6, 5, device=device, requires_grad=True)
    how = {"top_k": None, "threshold": 0.5, "mode": mode, "normalize": False, "backend": backend}
    given = {"support": torch.randn(1, 6, 5, device=device), "queue": torch.randn(9, 5, device=device)}
    (expected,) = torch.autograd.grad(fused(views, **given, **how), views)
    loss = fused(views, **given, **how)
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(torch.autograd.grad(loss, views)[0], expected)


@pytest.mark.parametrize(
    "views, arguments, error, says",
    [
        (torch.ones(3, 4), {}, ValueError, r"\[V, B, D\]"),
        (torch.ones(1, 3, 4), {}, ValueError, "V >= 2"),
        (torch.ones(2, 3, 4).int(), {}, TypeError, "float16"),
        (Z, {"mode": "repel"}, ValueError, "attract, eliminate"),
        (Z, {"aggregate": "median"}, ValueError, "max, mean"),
        (Z, {"reduction": "avg"}, ValueError, "mean, sum, none"),
        (Z, {"top_k": None, "threshold": None}, ValueError, "both be None"),
        (Z, {"top_k": 0}, ValueError, ">= 1"),
        (Z, {"support": torch.ones(3, 4)}, ValueError, r"support must be \[S, 3, 4\]"),
        (Z, {"keys": torch.ones(3, 3, 4)}, ValueError, r"keys must be \[2, 3, 4\]"),
        (Z, {"keys": torch.ones(2, 3, 4).double()}, TypeError, "float64"),
        (Z, {"queue": torch.ones(3, 5)}, ValueError, r"queue must be floating-point \[K, 4\]"),
        (Z, {"labels": torch.ones(4).long()}, ValueError, r"integers \[3\]"),
        (Z, {"temperature": 0.1, "logit_scale": 10.0}, ValueError, "not both"),
        (Z, {"backend": "fast"}, ValueError, "backend must be"),
    ],
)
def test_bad_input_says_what_to_do(views, arguments, error, says):
    with pytest.raises(error, match=says):
        fused(views, **arguments)


@pytest.mark.parametrize("of_images", [False, True], ids=["of_columns", "of_images"])
def test_sums_over_what_a_threshold_detects(monkeypatch, of_images):
    monkeypatch.setattr(detection, "BLOCK", 4)  # several tiles each way
    scorers, features = torch.randn(2, 6, 3), torch.randn(14, 3)
    ids = torch.where(torch.arange(14) % 5 == 1, UNFILLED, NO_COLUMN_ID)
    row_labels, col_labels = torch.arange(6) % 2, torch.arange(14) % 3
    own = torch.arange(14) % 6 == torch.arange(6)[:, None]
    found = ((scorers @ features.T).amax(0) > 0.3) & ~own & (ids != UNFILLED) & (row_labels[:, None] == col_labels)
    values = torch.randn(6 if of_images else 14, 2)
    arguments = values, scorers, features, 0.3, 6, ids, row_labels, col_labels, of_images
    operator = torch.ops.contrastive_ext.detected_sum.default
    expected = (found.T if of_images else found).float() @ values
    assert found.any()
    torch.testing.assert_close(operator(*arguments), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(operator(*arguments), expected)
    opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_views_that_score_themselves_are_their_own_support(run, mode, dtype):
    """Detection sees the views as one set in one call, as two in the other: the same lists, so the same loss."""
    backend, device = run
    shape = (2, 40, 1100) if backend == "triton" and device.type == "cpu" else (2, 300, 160)  # wide: the triangle pays
    views = torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    def step(**options):
        loss = fused(views, 0.1, mode=mode, top_k=8, threshold=None, backend=backend, reduction="none", **options)
        return loss, torch.autograd.grad(loss.square().sum(), views)[0]

    for a, b in zip(step(), step(support=views.detach()), strict=True):
        assert torch.equal(a, b)
