"""Calls of whole losses, the launches of the `triton` backend on the machine, held to the error rule of the tests.

Loss and gradient against float64 (tests/accuracy.py), one schedule per launch in turn. Uses launch_gate.pretend, which
changes Triton and the package for the rest of the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import launch_gate  # puts tests/ on the path
import torch
from triton.runtime.jit import JITFunction

import rows
from contrastive_ext.backends import dispatch
from contrastive_ext.backends.triton import launch as triton_launch
from contrastive_ext.backends.triton import replay
from promises import check_accuracy

from .report import Report
from .schedules import schedules
from .triton_kernels import launcher

_BACKENDS, _COMPILE = dispatch.BACKENDS, JITFunction._do_compile


class Call(NamedTuple):
    """A loss with its gradients, compiled for an architecture; `processors` decides whether one set is a triangle."""

    loss: rows.Loss
    usage: rows.Usage
    architecture: int
    descriptors: bool
    pairs: int = 20
    features: int = 40
    dtype: torch.dtype = torch.float16
    processors: int = 132

    def __str__(self) -> str:
        how = "" if self.architecture < 90 else " by descriptors" if self.descriptors else " by pointers"
        triangle = ", triangle" if self.processors < 132 else ""
        size = f"{self.pairs}x{self.features} {str(self.dtype).removeprefix('torch.')}"
        return f"sm_{self.architecture}{how} {self.loss.name} {self.usage.name} {size}{triangle}"


def calls(everything: bool) -> Iterator[Call]:
    """Plain, hard, columns, ids, lists of launches: two of each architecture, or everything."""
    by_name = {x.name: x for x in (*rows.LOSSES, *rows.USAGES)}
    infonce, hard = by_name["infonce"], by_name["hard"]
    for architecture, descriptors in ((80, False), (90, True), (90, False)):
        where: dict[str, Any] = {"architecture": architecture, "descriptors": descriptors}
        yield Call(hard, by_name["two_view"], **where, processors=3)
        if not everything:
            continue
        for loss, usage in itertools.product((infonce, hard), rows.USAGES):
            yield Call(loss, usage, **where)
        yield Call(next(x for x in rows.RANKED if x.name == "bayesian_histogram"), by_name["two_view"], **where)
        for usage in ("two_view", "symmetric", "moco"):
            yield Call(infonce, by_name[usage], **where, features=300)
        for processors, dtype in itertools.product((3, 132), (torch.float16, torch.bfloat16, torch.float32)):
            yield Call(
                infonce, by_name["two_view"], **where, pairs=75, features=128, dtype=dtype, processors=processors
            )


def run(call: Call) -> list[tuple[str, Any, Report]]:
    """The launches of a call, which raises if anything is wrong."""
    reports: list[tuple[str, Any, Report]] = []
    turns = itertools.cycle(schedules(2))
    pretend(call, launcher(lambda: next(turns), reports))
    torch.manual_seed(0)
    check_accuracy(call.loss, call.usage, "random", call.pairs, call.features, call.dtype, 0.3, ("triton", "cpu"))
    assert reports, "nothing was launched"
    return reports


def pretend(call: Call, launch: Any) -> None:
    """CPU tensors are a GPU's for the triton backend; the others stay what they are."""
    triton_launch.kernels().configs.DESCRIPTORS_FROM = 90 if call.descriptors else 1000
    for module in vars(triton_launch.kernels()).values():
        for function in vars(module).values() if isinstance(module, ModuleType) else ():
            if isinstance(function, JITFunction):
                function.device_caches.clear()  # they do not know the architecture
    replay.forget()  # a replay's launches would not be seen
    JITFunction._do_compile = _COMPILE
    launch_gate.pretend(call.architecture, launch, call.processors)
    triton = {b.name: b for b in dispatch.BACKENDS}["triton"]
    dispatch.BACKENDS = tuple(triton if b.name == "triton" else b for b in _BACKENDS)
