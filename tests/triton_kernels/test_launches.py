"""How many launches the short road is, counted without a GPU: interpreted kernels and operations of torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import contrastive_ext as ce
from contrastive_ext.backends.triton import row_stats as backend
from contrastive_ext.backends.triton import whole_loss as triton_whole_loss
from contrastive_ext.losses import pair_loss, stats
from contrastive_ext.problem.short_road import WholeLossOps
from repository import ROOT
from rows import random_pairs

REASON = backend.why_not(torch.device("cpu"), torch.float32, torch.float32, 8)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.interpreter]

# allocations and views: nothing runs on the device
FREE = ("empty", "new_empty", "empty_like", "view", "slice", "select", "detach", "alias", "t", "expand", "unsqueeze")


class _Launches(TorchDispatchMode):
    """Names of what would run on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    counted, run = _Launches(), GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        counted.names.append(executor.fn.__name__)
        with _disable_current_modes():  # the interpreter's own copies
            return run(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    # the functions behind the operators: a mode does not look inside an operator
    operators = WholeLossOps(triton_whole_loss._forward, triton_whole_loss._backward)
    monkeypatch.setattr(pair_loss, "operators_for", lambda *_: operators)
    monkeypatch.setattr(stats, "_warned", True)  # looks at the clamped rows where that waits for no device: not on one
    return counted


@pytest.mark.parametrize(
    "layout, dtype, forward, backward",
    [
        ("two_view", torch.float32, 3, 2),
        ("two_view", torch.float16, 3, 2),
        ("one_way", torch.float32, 3, 3),  # a sweep for each side
        ("symmetric", torch.float32, 3, 3),
    ],
)
@pytest.mark.parametrize("function", [ce.fused_infonce_loss, ce.fused_hard_negative_loss], ids=lambda f: f.__name__)
def test_a_small_batch_is_few_launches(launches, function, layout, dtype, forward, backward):
    z1, z2 = (z.requires_grad_() for z in random_pairs(40, 8, dtype))
    with launches:
        loss = function(z1, z2, layout=layout, backend="triton")
    assert len(launches.names) == forward, launches.names
    upstream = torch.ones_like(loss)
    launches.names.clear()
    with launches:
        torch.autograd.grad(loss, [z1, z2], upstream)
    assert len(launches.names) == backward, launches.names


def test_ragged_batches_compile_nothing():
    """For a pretended GPU, in a process of its own: here kernels are interpreted."""
    gate = ROOT / "tools" / "launch_gate.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(gate), "--ragged"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no ragged batch compiles" in done.stdout
