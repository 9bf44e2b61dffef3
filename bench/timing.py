"""Interleaved timing: every round calls each method once, in rotated order, on inputs the cache does not hold.

Machines are noisy and drift; rounds make the noise common to all methods: ratios within a round are worth quoting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .case import Inputs
from .device import Device

# Below: rounds of every measurement; above: where more rounds stop narrowing the quartiles.
LEAST_ROUNDS = {"cpu": 5, "cuda": 30}
MOST_ROUNDS = {"cpu": 25, "cuda": 100}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every round; entry i of all methods comes from the same round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> list[float]:
        """Forward plus backward of every round."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    points = torch.tensor(values, dtype=torch.float64)
    return torch.quantile(points, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def ratio(baseline: Timing, mine: Timing) -> list[float]:
    """Quartiles over rounds of baseline time / my time: above 1 I am faster."""
    return quartiles([b / m for b, m in zip(baseline.total, mine.total, strict=True)])


def interleave(
    device: Device, calls: dict[str, Callable[[Inputs], Tensor]], inputs: Sequence[Inputs], seconds: float, least: int
) -> dict[str, Timing]:
    """Time forward and backward of every call, `least` rounds and on for about `seconds`, at most MOST_ROUNDS.

    calls   name -> 0-d loss of its inputs; the first round warms up and is not counted
    inputs  rotated from call to call
    """
    names = list(calls)
    timings = {name: Timing() for name in names}
    began, rounds = 0.0, -1
    while rounds < least or (rounds < MOST_ROUNDS[device.kind] and time.perf_counter() - began < seconds):
        marks = {}
        for i in range(len(names)):
            turn = rounds + i
            name = names[turn % len(names)]
            marks[name] = _timed_call(device, calls[name], inputs[turn % len(inputs)])
        device.synchronize()
        if rounds < 0:
            began = time.perf_counter()
        else:
            for name, (start, middle, end) in marks.items():
                timings[name].forward.append(device.milliseconds(start, middle))
                timings[name].backward.append(device.milliseconds(middle, end))
        rounds += 1
    return timings


def _timed_call(device: Device, call: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple:
    start = device.mark()
    loss = call(inputs)
    middle = device.mark()
    torch.autograd.grad(loss, inputs.leaves)
    return start, middle, device.mark()


def rotation(device: Device, make_inputs: Callable[[int], Inputs], most: int = 32) -> list[Inputs]:
    """Copies of a case's inputs with different seeds that together are twice the last cache."""
    first = make_inputs(0)
    size = sum(
        z.numel() * z.element_size() for z in (*first.leaves, first.queue, *first.constants.values()) if z is not None
    )
    copies = min(most, max(2, -(-2 * device.cache_bytes() // size)))
    return [first, *(make_inputs(seed) for seed in range(1, copies))]
