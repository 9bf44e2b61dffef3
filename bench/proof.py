"""Correctness at real shapes, the evidence behind a `VERIFIED` entry: tile paths against float64, repeats bit by bit.

    python -m bench proof --shard i/n --out FOLDER     every n-th case into FOLDER/proof-i.jsonl

Several processes share a device: each compiles its own kernels meanwhile. A case is proven by `ratio` <= 1 (the gate's:
losses and all gradients against their tolerance) and `repeats`: the second run has the same bits as the first.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import baselines, gate
from .case import Case, Inputs
from .device import Device
from .losses import inputs_of
from .methods import Method, backends_for


def prove(device: Device, path: Path, cases: Sequence[Case]) -> int:
    """Write a JSON line for each case and backend as it is known; the number of results that are not proven."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unproven = 0
    with path.open("w") as out:
        for case in cases:
            for line in _lines(device, case):
                unproven += not line["proven"]
                out.write(json.dumps(line) + "\n")
                out.flush()
                print("ok " if line["proven"] else "RED", line["case"], line["backend"], line["verdict"], flush=True)
    return unproven


def _lines(device: Device, case: Case):
    with device.precision(case.tf32):
        began = time.perf_counter()
        inputs = inputs_of(case, device.torch)
        truth = gate.truth_of(case, inputs)
        device.synchronize()
        truth_s = time.perf_counter() - began
        for method in backends_for(case, device):
            began = time.perf_counter()
            line = {"case": case.name, "loss": case.loss, "dtype": case.dtype, "backend": method.name}
            try:
                line |= _checked(device, case, method, inputs, truth)
                line["verdict"] = f"ratio {line['ratio']:.3f}" + (
                    "" if line["repeats"] else ", other bits when repeated"
                )
                line["proven"] = line["ratio"] <= 1 and line["repeats"]
            except Exception as error:  # a case that cannot run must not hide the others
                traceback.print_exc()
                line |= {"proven": False, "verdict": f"{type(error).__name__}: {str(error)[:300]}"}
            yield line | {"seconds": round(time.perf_counter() - began, 2), "truth_seconds": round(truth_s, 2)}


def _checked(device: Device, case: Case, method: Method, inputs: Inputs, truth: gate.Truth) -> dict:
    ratio = gate.error_ratio(method, case, inputs, truth)
    first, second = _bits(case, method, inputs, truth), _bits(case, method, inputs, truth)
    # the third call of a kind is replayed on the short road
    means = [_mean_bits(case, method, inputs) for _ in range(3)]
    pairs = [(first, second), *((means[0], other) for other in means[1:])]
    found = {"ratio": ratio, "repeats": all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))}
    if case.learned:
        found |= {"temperature_gradient": (error := _learned(case, method, inputs))}
        found["ratio"] = max(ratio, error)
    device.synchronize()
    return found


def _bits(case: Case, method: Method, inputs: Inputs, truth: gate.Truth) -> tuple[Tensor, ...]:
    losses = method.row_losses(case, inputs)
    return (losses.detach(), *torch.autograd.grad(losses, inputs.leaves, truth.upstream.to(losses.dtype)))


def _mean_bits(case: Case, method: Method, inputs: Inputs) -> tuple[Tensor, ...]:
    loss = method.mean_loss(case, inputs)
    return (loss.detach(), *torch.autograd.grad(loss, inputs.leaves))


def _learned(case: Case, method: Method, inputs: Inputs) -> float:
    """Error of the temperature's gradient over its tolerance, where it is a tensor that only the device reads."""

    def gradient(row_losses, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        temperature = torch.tensor(case.temperature, dtype=dtype, device=inputs.z1.device, requires_grad=True)
        return torch.autograd.grad(row_losses(replace(case, temperature=temperature), inputs).mean(), temperature)[0]

    operand_dtype = case.torch_dtype if case.torch_dtype.itemsize == 2 else None

    def dense(case: Case, inputs: Inputs) -> Tensor:
        return baselines.chunked(case, inputs, operand_dtype=operand_dtype)

    exact = gradient(dense, inputs.to(torch.float64), torch.float64)
    mine = gradient(method.row_losses, inputs, torch.float32)
    return float((mine.double() - exact).abs() / exact.abs()) / gate.RELATIVE_L2.get(case.torch_dtype, 1e-4)
