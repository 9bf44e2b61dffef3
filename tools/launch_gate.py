"""Compiles what the Triton backend launches, as it launches it, for a GPU that is not there; nothing runs.

    python tools/launch_gate.py [--only REGEX] [--arch 90]        `make launches`
    python tools/launch_gate.py --ragged                          what ragged batches compile beyond the first one

tools/gate.py compiles kernels from a table of its own; here arguments, tiles and constants come from the backend, over
the cases of `python -m bench smoke` and the usages of tests/rows.py. It finds what neither that table nor the
interpreter knows: a combination of arguments that the compiler refuses. Uses Triton's internals, those of 3.6 and 3.9.
"""

# ruff: noqa: E402
# bench and tests/rows.py are not installed

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import contrastive_ext
import rows
from bench import cases, gate, losses, methods
from bench.device import Device
from contrastive_ext.backends import dispatch
from contrastive_ext.backends.triton import launch as triton_launch

PROCESSORS = 132  # of the H200
SHARED_LIMIT = 227 << 10
# images of a first batch, then others laid out alike: one program reduces the losses, many do, a triangle
RAGGED = [
    (512, (1, 2, 3, 5, 17, 33, 70, 101, 255, 257, 511, 513, 700, 1001, 1023, 1500, 2000, 2047)),
    (2049, (2051, 3001, 4000)),
    (4500, (4501, 4999, 5003)),
]


class Driver:
    """What compiling asks the driver of a GPU."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def pretend(architecture: int, launcher=lambda kernel: lambda *launch: None, processors: int = PROCESSORS) -> list[str]:
    """Let CPU tensors be a GPU's; launches return at once, or are what `launcher` makes. The list fills with faults."""
    faults: list[str] = []
    compile_kernel = JITFunction._do_compile

    def compile_only(function, *args):
        try:
            kernel = compile_kernel(function, *args)
        except Exception as error:
            faults.append(f"{function.__name__} does not compile: {str(error).strip().splitlines()[-1][:200]}")
            raise
        if kernel.metadata.shared > SHARED_LIMIT:
            faults.append(f"{function.__name__}: {kernel.metadata.shared} bytes of shared memory")
        kernel._run = launcher(kernel)
        return kernel

    triton.runtime.driver.set_active(Driver(architecture))
    JITFunction._do_compile = compile_only
    CompiledKernel._init_handles = lambda kernel: None
    triton_launch.architecture = lambda device: architecture
    triton_launch.processors = lambda device: processors
    triton_launch.interpreted = lambda: False
    dispatch.BACKENDS = tuple(
        dataclasses.replace(b, why_not=lambda *call, reason=None if b.name == "triton" else "not asked for": reason)
        for b in dispatch.BACKENDS
    )
    return faults


def ragged() -> list[str]:
    """Kernels compiled by ragged batches after a first one of each layout of the work: there should be none."""
    compiled: list[str] = []
    compile_kernel = JITFunction._do_compile

    def counted(function, *args):
        compiled.append(function.__name__)
        return compile_kernel(function, *args)

    JITFunction._do_compile = counted
    found = []
    for first, others in RAGGED:
        _step(first)
        print(f"B = {first} compiles", *compiled, flush=True)
        compiled.clear()
        for images in others:
            _step(images)
        found += [f"batches of {others} compile {name} again" for name in compiled]
        compiled.clear()
    return found


def _step(images: int) -> None:
    z = [torch.randn(images, 128, dtype=torch.bfloat16, requires_grad=True) for _ in "12"]
    torch.autograd.grad(contrastive_ext.fused_infonce_loss(*z, backend="triton"), z)


def smoke_call(case):
    """A case of the benchmark with its gradient; of results that nobody computed any error will do."""
    device = Device("cpu")
    inputs = losses.inputs_of(case, device.torch)
    truth = gate.truth_of(case, inputs)
    for method in methods.backends_for(case, device):
        gate.error_ratio(method, case, inputs, truth)


def usage_call(loss, usage, features: int, operand_dtype: str | None = None):
    """A usage with its gradient: few features with statistics, many with a learned temperature."""
    z1, z2 = rows.random_pairs(70, features, torch.float32 if operand_dtype else torch.float16)
    z2, more = usage.options(z1, z2)
    more = more | ({"operand_dtype": operand_dtype} if operand_dtype else {})
    leaves = [z1.requires_grad_(), z2.requires_grad_(), torch.tensor(0.2, requires_grad=True)]
    few = features <= 256
    result = loss.function(
        *leaves[:2], 0.2 if few else leaves[2], backend="triton", return_stats=few, **loss.parameters, **more
    )
    torch.autograd.grad(result[0] if few else result, leaves, allow_unused=True)


def sums_call(features: int):
    """Sums over pairs with their gradient, of negatives and of positives by id, scale and bias learned."""
    z1, z2 = rows.random_pairs(70, features, torch.float16)
    leaves = [z1.requires_grad_(), z2.requires_grad_(), *(torch.tensor(x, requires_grad=True) for x in (5.0, -2.0))]
    loss = contrastive_ext.fused_sigmoid_loss(*leaves, ids=torch.arange(70) % 9, backend="triton")
    torch.autograd.grad(loss, leaves)


def calls():
    """(name, function, arguments)"""
    yield from ((case.name, smoke_call, (case,)) for case in cases.smoke_cases())
    for loss, usage, features in itertools.product([*rows.LOSSES, *rows.RANKED], rows.USAGES, (40, 300)):
        if loss.name in ("infonce", "hard") or (loss.name == "bayesian_histogram" and usage in rows.RANKED_USAGES):
            yield f"{loss.name} {usage.name} D={features}", usage_call, (loss, usage, features)
    yield from ((f"sigmoid ids D={features}", sums_call, (features,)) for features in (40, 300))
    for loss, usage, name in itertools.product(rows.LOSSES, rows.USAGES, ("fp16x3",)):
        if loss.name in ("infonce", "hard"):
            yield f"{loss.name} {usage.name} {name}", usage_call, (loss, usage, 40, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="calls whose name matches")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--ragged", action="store_true", help="count what ragged batches compile")
    options = parser.parse_args()
    faults = pretend(options.arch)
    if options.ragged:
        faults += ragged()
        print(*(faults or ["no ragged batch compiles"]), sep="\n")
        return len(faults)
    chosen = [call for call in calls() if re.search(options.only, call[0])]
    for name, function, arguments in chosen:
        began, known = time.monotonic(), len(faults)
        try:
            function(*arguments)
        except Exception as error:
            if len(faults) == known:
                faults.append(f"{type(error).__name__}: {str(error)[:200]}")
        faults[known:] = [f"{name}: {fault}" for fault in faults[known:]]
        print("RED" if len(faults) > known else "ok ", name, f"{time.monotonic() - began:.1f} s", flush=True)
    print(f"Triton {triton.__version__}, {len(chosen)} calls", *(faults or ["launch gate: green"]), sep="\n")
    return 1 if faults or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
