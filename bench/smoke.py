"""Correctness only, at tiny shapes: every loss, layout and dtype on every backend. What compute-sanitizer watches."""

from __future__ import annotations

from collections.abc import Sequence

from . import gate
from .case import Case
from .device import Device
from .losses import inputs_of
from .methods import Method, backends_for


def smoke(device: Device, cases: Sequence[Case], more: Sequence[Method] = ()) -> int:
    """Print one line per case, return the number of wrong results; `more` methods are checked beside the backends."""
    wrong = checked = 0
    for case in cases:
        inputs = inputs_of(case, device.torch)
        truth = gate.truth_of(case, inputs)
        ratios = {m.name: gate.error_ratio(m, case, inputs, truth) for m in [*backends_for(case, device), *more]}
        device.synchronize()  # an asynchronous error belongs to this case
        wrong += sum(ratio > 1 for ratio in ratios.values())
        checked += len(ratios)
        verdict = "ok " if all(ratio <= 1 for ratio in ratios.values()) else "RED"
        print(verdict, case.name, ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    print(f"{checked} results, {wrong} beyond the tolerance" if checked else "no backend can run on this device")
    return wrong if checked or not cases else 1
