"""pytest-benchmark entry, `pytest bench/test_speed.py`: few cases, no timed assertion; `python -m bench` measures."""

from __future__ import annotations

import pytest
import torch

from .case import Case
from .device import Device
from .losses import LOSSES, PAIR_LOSSES, inputs_of
from .methods import methods_for

DEVICE = Device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [Case(name, "two_view", 2048, 2048, 128, temperature=LOSSES[name].temperature) for name in PAIR_LOSSES]
PAIRS = [(case, method) for case in CASES for method in methods_for(case, DEVICE)]


@pytest.mark.parametrize(("case", "method"), PAIRS, ids=[f"{c.loss}-{m.name}" for c, m in PAIRS])
def test_forward_and_backward(benchmark, case, method):
    inputs = inputs_of(case, DEVICE.torch)
    benchmark.group = case.name

    def step():
        torch.autograd.grad(method.mean_loss(case, inputs), inputs.leaves)
        DEVICE.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
