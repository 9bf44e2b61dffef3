"""The table of goals in a minute: our backends and the eager formula, share of the library's rate, kernel by kernel.

python -m bench speed --out FOLDER       FOLDER/speed.json, a results file, and FOLDER/kernels.json, see `kernel_times`
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from . import environment, report
from .case import Case
from .device import Device
from .harness import Harness
from .losses import inputs_of
from .methods import AUTOCAST, EAGER, backends_for, compiled_for
from .results import Results

ROUNDS, PROFILED_CALLS = 15, 3


def speed(
    device: Device, out: Path, limit: float, cases: Sequence[Case], compile: bool = True, against: Results | None = None
) -> int:
    """Time every case, the first in any case, until `limit` seconds are over; 1 if a result was wrong.

    Baselines are eager PyTorch in float32, as autocast has it where inputs have 16 bits, and at the end, with
    `compile` and if there is time, torch.compile of both for the first case.
    """
    out.mkdir(parents=True, exist_ok=True)
    results, began = Results(environment.facts(device)), time.monotonic()
    harness = Harness(device, None, seconds=0.0, rounds=ROUNDS)
    timed = []
    for case in cases:
        if timed and time.monotonic() - began > limit:
            results.left_out.append(case.name)
            continue
        matched = [AUTOCAST] if case.torch_dtype.itemsize == 2 else []
        rows = harness.run(case, [*backends_for(case, device), EAGER, *matched])
        results.add(rows)
        for row in rows:
            print(_line(case, row), flush=True)
        timed.append(case)
        results.seconds = round(time.monotonic() - began, 1)
        results.write(out / "speed.json")
    results.write(out / "speed.json")
    kernels = {case.name: kernel_times(device, case) for case in timed}
    (out / "kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
    if compile and time.monotonic() - began < limit:
        rows = harness.run(cases[0], compiled_for(cases[0], device))
        results.add(rows)
        results.write(out / "speed.json")
        for row in rows:
            print(_line(cases[0], row), flush=True)
    if against is not None:
        print(report.comparison(results, against))
    return 0 if results.is_green else 1


def kernel_times(device: Device, case: Case) -> dict[str, dict[str, list[float]]]:
    """Backend -> kernel -> [launches, microseconds] of one forward and backward, as the device's profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CUDA if device.is_cuda else torch.profiler.ProfilerActivity.CPU]
    inputs, found = inputs_of(case, device.torch), {}
    for method in backends_for(case, device):
        with device.precision(case.tf32), torch.profiler.profile(activities=activities) as profile:
            for _ in range(PROFILED_CALLS):
                torch.autograd.grad(method.mean_loss(case, inputs), inputs.leaves)
            device.synchronize()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for event in profile.events():
            if device.is_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            entry = sums[event.name[:80]]
            entry[0] += 1 / PROFILED_CALLS
            entry[1] += (event.device_time if device.is_cuda else event.cpu_time) / PROFILED_CALLS
        found[method.name] = {name: [round(x, 2) for x in entry] for name, entry in sums.items()}
    return found


def _line(case: Case, row) -> str:
    if row.forward_ms is None:
        return f"{case.name:<50} {row.backend:<10} {row.status} gate {row.gate}"
    shares = [f"{100 * share:.0f} %" if share else "-" for share in (row.forward_gemm_share, row.backward_gemm_share)]
    return (
        f"{case.name:<50} {row.backend:<10} {row.forward_ms:9.3f} + {row.backward_ms:9.3f} ms  of the library's rate "
        f"{shares[0]}, {shares[1]}  {_floors(row)}{row.peak_extra_mib or 0:8.0f} MiB  graph {row.graph_ms}  "
        f"gate {row.gate:.2f}  " + ", ".join(f"{name} x{ratio[1]:.2f}" for name, ratio in row.ratios.items())
    )


def _floors(row) -> str:
    if row.memory_floor_ms is None:
        return ""
    exponentials = "" if row.exp_floor_ms is None else "exp {:.3f} + {:.3f}, ".format(*row.exp_floor_ms)
    return f"floors: {exponentials}memory {row.memory_floor_ms:.3f} ms  "
