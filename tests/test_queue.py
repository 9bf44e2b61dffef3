"""The queue keeps exactly the last K keys, whatever batches arrive, across checkpoints and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contrastive_ext as ce
from contrastive_ext.pairs import UNFILLED


def _keys(start: int, n: int, dim: int = 2) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, dim)


@given(size=st.integers(1, 13), batches=st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_holds_exactly_the_last_keys(size, batches):
    queue, seen = ce.NegativeQueue(size, 2), 0
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
    keys = torch.randn(3, 4, dtype=torch.float64, device=device)
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
    queue = ce.NegativeQueue(5, 8, dtype=dtype, device=device)
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
