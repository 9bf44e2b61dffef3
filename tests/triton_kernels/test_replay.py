"""Calls of the short road that are replayed: the same bits as when they are worked out, and never anything else.

In Triton's interpreter (TRITON_INTERPRET=1) or on a GPU, where a replay launches compiled kernels.
"""

from __future__ import annotations

import re

import pytest
import torch

from contrastive_ext.backends.triton import launch, replay, row_stats, whole_loss
from repository import ROOT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = row_stats.why_not(DEVICE, torch.float32, torch.float32, 8)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    *([pytest.mark.interpreter] if DEVICE.type == "cpu" else []),
]
FORMULAS = {"infonce": ((), (1.0,)), "hard_negative": ((0.1, 1.0, 0.0), (1.0, 2.0))}


def _batch(images: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(n, 8, device=DEVICE).to(dtype) for n in (images, columns)]


@pytest.mark.parametrize(
    "formula, dtype, learned",
    [("infonce", torch.float32, False), ("infonce", torch.float16, True), ("hard_negative", torch.float16, False)],
)
@pytest.mark.parametrize("layout, columns", [("two_view", 37), ("one_way", 45), ("symmetric", 37)])
def test_a_replay_gives_the_same_bits_on_a_gpu_too(layout, columns, formula, dtype, learned):
    """Three calls with other numbers: worked out, watched, replayed."""
    parameters, exponents = FORMULAS[formula]
    value = 0.0 if learned else 7.0
    forward, backward = replay.Replayed(whole_loss._launch_forward), replay.Replayed(whole_loss._launch_backward)
    options = value, layout, True, formula, parameters, exponents, "mean"
    later = value, layout, True, exponents, "mean", learned
    sides = 2 if layout == "symmetric" else 1
    for i in range(3):
        z1, z2 = _batch(37, columns, dtype)
        scale = torch.tensor(7.0 + i, device=DEVICE) if learned else None
        results = forward((z1, z2, scale), options)
        expected = whole_loss._launch_forward(z1, z2, scale, *options)
        loss, operands, norm, lse, saved, clamped = results
        for mine, other in zip((loss, operands, norm, lse, clamped), (*expected[:4], expected[5]), strict=True):
            assert torch.equal(mine, other)
        shape = sides, len(exponents), lse.shape[2]
        parts = [whole_loss._parts_of_saved(x, *shape) for x in (saved, expected[4])]  # what is between is nobody's
        for mine, other in list(zip(*parts, strict=True))[: 3 if dtype == torch.float16 else 2]:
            assert torch.equal(mine, other)
        tensors = z1, z2, scale, operands, norm, lse, saved, torch.rand_like(loss)
        gradients = zip(backward(tensors, later), whole_loss._launch_backward(*tensors, *later), strict=True)
        assert all(torch.equal(mine, other) for mine, other in gradients)
    for calls in (forward, backward):
        assert [type(x) for x in calls.kinds.values()] == [replay.Recording]


def test_what_computes_beside_its_launches_is_not_replayed():
    backward = replay.Replayed(
        whole_loss._launch_backward
    )  # of unreduced losses: the upstream gradient is multiplied in
    options = 7.0, "two_view", True, "infonce", (), (1.0,), "none"
    for _ in range(3):
        z1, z2 = _batch(20, 20, torch.float32)
        losses, operands, norm, lse, saved, _ = whole_loss._launch_forward(z1, z2, None, *options)
        tensors = z1, z2, None, operands, norm, lse, saved, torch.rand_like(losses)
        later = 7.0, "two_view", True, (1.0,), "none", False
        gradients = zip(backward(tensors, later), whole_loss._launch_backward(*tensors, *later), strict=True)
        assert all(torch.equal(mine, other) for mine, other in gradients)
    assert list(backward.kinds.values()) == [None]


def test_a_kind_is_everything_that_a_launch_may_depend_on(monkeypatch):
    forward = replay.Replayed(whole_loss._launch_forward)
    options = 7.0, "two_view", True, "infonce", (), (1.0,), "mean"
    z1, z2 = _batch(20, 20, torch.float32)
    for _ in range(3):
        forward((z1, z2, None), options)
    known = len(forward.seen)
    odd = torch.randn(20 * 8 + 1, device=DEVICE)[1:].view(20, 8)
    config = launch.kernels().configs
    forward((odd, z2, None), options)  # not aligned
    forward((z1, z2, None), (8.0, *options[1:]))
    forward((z1[:18], z2[:18], None), options)
    monkeypatch.setattr(config, "preferred", {config.Line("forward", "ieee", 64, 0): config.tile("16x16", 1, 1)})
    forward((z1, z2, None), options)
    assert len(forward.seen) == known + 4
    assert len(forward.kinds) == 1


def test_tensors_that_share_memory_are_not_replayed():
    """Where one argument ends and the other begins could not be told from addresses."""
    forward = replay.Replayed(whole_loss._launch_forward)
    options = 7.0, "two_view", True, "infonce", (), (1.0,), "mean"
    for _ in range(3):
        (z,) = _batch(20, 0, torch.float32)[:1]
        loss = forward((z, z, None), options)[0]
        assert torch.equal(loss, whole_loss._launch_forward(z, z, None, *options)[0])
    assert list(forward.kinds.values()) == [None]


def test_kinds_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    calls = replay.Replayed(lambda x, number: (x.new_empty(number),))
    for number in range(20):
        for _ in range(3):
            assert calls((torch.empty(1, device=DEVICE),), (number,))[0].shape == (number,)
        assert len(calls.seen) <= 3 and len(calls.kinds) <= 3


def test_autotune_hears_of_tiles_that_a_replay_takes(monkeypatch):
    config = launch.kernels().configs
    forward = replay.Replayed(whole_loss._launch_forward)
    options = 7.0, "two_view", True, "infonce", (), (1.0,), "mean"
    asked = []
    for _ in range(3):
        monkeypatch.setattr(config, "asked", set())
        forward((*_batch(20, 20, torch.float32), None), options)
        asked.append(set(config.asked))
    assert asked[0] and asked[0] == asked[1] == asked[2]


def test_every_launch_can_be_watched():
    """A kernel launched beside `replay.start` would be missing in a replay."""
    for path in (ROOT / "contrastive_ext" / "backends" / "triton").glob("*.py"):
        assert not re.search(r"_kernel\[", path.read_text()), path
