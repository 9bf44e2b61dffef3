"""The queue keeps exactly the last K keys, whatever batches arrive, across checkpoints and compilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contrastive_ext as ce
from contrastive_ext.batch import queue as queue_module
from contrastive_ext.problem.pairs import UNFILLED


def _keys(start: int, n: int, dim: int = 2) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, dim)


@given(size=st.integers(1, 13), batches=st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_holds_exactly_the_last_keys(size, batches):
    queue, seen = ce.NegativeQueue(size, 2, normalize=False), 0
    for n in batches:
        queue.enqueue(_keys(seen, n), ids=torch.arange(seen, seen + n))
        seen += n
    expected = list(range(max(0, seen - size), seen))
    filled = queue.ids != UNFILLED
    assert sorted(queue.data[filled, 0].tolist()) == expected
    assert sorted(queue.ids[filled].tolist()) == expected
    assert queue.count.item() == len(expected)
    assert queue.pointer.item() == seen % size


def test_unfilled_rows_are_no_negatives(run):
    backend, device = run
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64, device=device)
    keys = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64, device=device))
    queue = ce.NegativeQueue(10, 4, dtype=torch.float64, device=device)
    for function in (ce.fused_infonce_loss, ce.fused_debiased_loss, ce.fused_hard_negative_loss):
        torch.testing.assert_close(function(z1, z2, queue=queue, backend=backend), function(z1, z2, backend=backend))
    queue.enqueue(keys)
    for function in (ce.fused_infonce_loss, ce.fused_debiased_loss, ce.fused_hard_negative_loss):
        part_filled = function(z1, z2, queue=queue, backend=backend)
        torch.testing.assert_close(part_filled, function(z1, z2, queue=keys, backend=backend))


def test_an_empty_queue_alone_gives_zero(run):
    backend, device = run
    z1 = torch.randn(6, 4, device=device, requires_grad=True)
    queue = ce.NegativeQueue(8, 4, device=device)
    loss, stats = ce.fused_decoupled_loss(
        z1, z1.detach(), queue=queue, layout="one_way", in_batch_negatives=False, return_stats=True, backend=backend
    )
    loss.backward()
    assert loss.item() == 0.0
    assert z1.grad.eq(0).all()
    assert stats.to_dict()["empty_rows"] == 6
    assert stats.to_dict()["cancelled_fraction"] == 1.0


def test_a_refused_batch_leaves_the_queue_as_it_was():
    queue = ce.NegativeQueue(4, 2)
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(ValueError, match="on cpu; got"):
        queue.enqueue(_keys(0, 2), ids=torch.arange(2, device="meta"))
    assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())


def test_checkpoint_restores_everything():
    queue = ce.NegativeQueue(7, 2)
    queue.enqueue(_keys(0, 10), ids=torch.arange(10))
    restored = ce.NegativeQueue(7, 2)
    restored.load_state_dict(copy.deepcopy(queue.state_dict()))
    for step in (queue, restored):
        step.enqueue(_keys(10, 3), ids=torch.arange(10, 13))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_storage(run, dtype):
    backend, device = run
    z1, z2 = torch.randn(2, 6, 8, device=device)
    keys = torch.randn(5, 8, device=device)
    queue = ce.NegativeQueue(5, 8, dtype=dtype, device=device, normalize=False)
    queue.enqueue(keys)
    assert queue.data.dtype == dtype
    rounded = ce.fused_infonce_loss(z1, z2, queue=keys.to(dtype).float(), backend=backend)
    # to rounding: a queue that knows which rows are filled is swept with a mask
    torch.testing.assert_close(ce.fused_infonce_loss(z1, z2, queue=queue, backend=backend), rounded, rtol=1e-6, atol=0)


def test_enqueue_is_compiled_whole():
    queue, eager = ce.NegativeQueue(7, 2), ce.NegativeQueue(7, 2)
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
    for start, n in ((0, 3), (3, 3), (6, 3)):
        compiled(_keys(start, n))
        eager.enqueue(_keys(start, n))
    assert torch.equal(queue.data, eager.data)
    assert torch.equal(queue.ids, eager.ids)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: ce.NegativeQueue(0, 4), ValueError, "size"),
        (lambda: ce.NegativeQueue(4, 4, dtype=torch.int8), TypeError, "floating"),
        (lambda: ce.NegativeQueue(4, 4).enqueue(torch.ones(2, 3)), ValueError, r"\[n, 4\]"),
        (lambda: ce.NegativeQueue(4, 4).enqueue(torch.ones(2, 4), ids=torch.ones(2)), ValueError, "integers"),
        (lambda: ce.NegativeQueue(4, 4).enqueue(torch.ones(2, 4), ids=torch.ones(3).long()), ValueError, r"\[2\]"),
    ],
)
def test_bad_arguments_say_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


KEYS_OFF_UNIT = 5.0 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
QUEUED = {
    "pairs": lambda z, queue, **o: ce.fused_infonce_loss(z, z.flip(0), queue=queue, **o),
    "queue only": lambda z, queue, **o: ce.fused_debiased_loss(
        z, z.flip(0), queue=queue, layout="one_way", in_batch_negatives=False, **o
    ),
    "ranks": lambda z, queue, **o: ce.fused_bayesian_loss(z, z.flip(1), queue=queue, **o),
    "false negatives": lambda z, queue, **o: ce.fused_false_negative_loss(
        torch.stack([z, z.flip(0)]), queue=queue, **o
    ),
    "self-labels": lambda z, queue, **o: ce.fused_self_labeling_loss(z, z.flip(0), queue, **o),
    "soft targets": lambda z, queue, **o: ce.fused_soft_target_loss(z, queue, z, teacher_temperature=0.1, **o),
    "soft targets, queue": lambda z, queue, **o: ce.fused_soft_target_loss(
        z, z, z, teacher_temperature=0.1, queue=queue, **o
    ),
    "a module": lambda z, queue, **o: ce.InfoNCELoss(queue=queue, **o)(z, z.flip(0)),
}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_keys_become_unit_rows_before_they_are_rounded(given, stored):
    keys = (30 * KEYS_OFF_UNIT.double()).to(given)
    keys[2] = 0
    queue = ce.NegativeQueue(7, 4, dtype=stored)
    with torch.autocast("cpu", torch.bfloat16):
        queue.enqueue(keys)
    exact = torch.nn.functional.normalize(keys.double(), dim=1)
    made_in = torch.promote_types(torch.promote_types(given, stored), torch.float32)
    assert queue.data[2].eq(0).all()
    # one rounding to the storage dtype, and a few ulps of the dtype in which the row was made
    allowed = exact.abs() * (torch.finfo(stored).eps / 2 + 8 * torch.finfo(made_in).eps)
    assert ((queue.data.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("name", QUEUED)
def test_a_queue_of_raw_encoder_outputs_means_the_same_as_one_of_unit_keys(name):
    z = torch.randn(6, 4)
    queue = ce.NegativeQueue(9, 4)
    queue.enqueue(KEYS_OFF_UNIT)
    unit = torch.nn.functional.normalize(KEYS_OFF_UNIT, dim=1)
    torch.testing.assert_close(QUEUED[name](z, queue), QUEUED[name](z, unit))


@pytest.mark.parametrize("name", QUEUED)
def test_a_loss_that_takes_rows_as_given_refuses_a_queue_of_unit_rows(name):
    z, queue = torch.randn(6, 4), ce.NegativeQueue(9, 4)
    with pytest.raises(ValueError, match=r"NegativeQueue\(..., normalize=False\)"):
        QUEUED[name](z, queue, normalize=False)
    raw = ce.NegativeQueue(7, 4, normalize=False)
    raw.enqueue(KEYS_OFF_UNIT)
    assert torch.equal(raw.data, KEYS_OFF_UNIT)
    assert torch.equal(QUEUED[name](z, raw, normalize=False), QUEUED[name](z, KEYS_OFF_UNIT, normalize=False))


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name in QUEUED
        for kind in ("tensor", "queue")
        if (name, kind) != ("soft targets", "tensor")  # keys of the call itself: normalised
    ],
)
def test_raw_rows_under_normalize_are_said_once(name, kind):
    z, queue = torch.randn(6, 4), ce.NegativeQueue(9, 4, normalize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QUEUED[name](z, torch.zeros(9, 4) if kind == "tensor" else queue)  # nothing to look at yet
        QUEUED[name](z, KEYS_OFF_UNIT, normalize=False)
    queue.enqueue(KEYS_OFF_UNIT)
    rows = torch.cat([torch.zeros(2, 4), KEYS_OFF_UNIT]) if kind == "tensor" else queue
    with pytest.warns(UserWarning, match=r"holds rows of length \d.* NegativeQueue") as said:
        QUEUED[name](z, rows)
        QUEUED[name](z, rows)
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows_of_every_dtype_are_not_reported(dtype):
    z, keys = torch.randn(6, 300), torch.randn(50, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, stats = ce.fused_infonce_loss(
            z, z.flip(0), queue=torch.nn.functional.normalize(keys, dim=1).to(dtype), return_stats=True
        )
        stats.to_dict()


def test_statistics_notice_raw_rows_where_nobody_looked(monkeypatch):
    z = torch.randn(6, 4)
    monkeypatch.setattr(queue_module, "_looked", True)  # a GPU is not looked at
    _, stats = ce.fused_infonce_loss(z, z.flip(0), queue=KEYS_OFF_UNIT, return_stats=True)
    with pytest.warns(UserWarning, match="hardest_negative is .* no cosine") as said:
        stats.to_dict()
        assert "normalized" not in stats.to_dict()
    assert len(said) == 1
    _, raw = ce.fused_infonce_loss(z, z.flip(0), queue=KEYS_OFF_UNIT, normalize=False, return_stats=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw.to_dict()
