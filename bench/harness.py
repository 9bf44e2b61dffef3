"""One case from inputs to rows: gate, then memory, then interleaved time. A red gate prints no speed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from . import gate, timing
from .case import Case, Inputs
from .device import Device
from .floors import floors
from .flops import executed_flops
from .gate import Truth
from .losses import inputs_of
from .memory import HostMemory, peak_mib_cuda
from .methods import COMPILED, Method, methods_for
from .results import OK, OUT_OF_MEMORY, RED, TOO_SLOW, Row
from .timing import Timing

# Share of the free memory a case may be estimated to need.
MEMORY_SHARE = 0.8
# Torch's allocator of CPUs raises a RuntimeError like any other; of a library that takes more than was estimated.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# A method whose single call takes longer is not repeated: the whole run has minutes.
SLOWEST_CALL_S = 10.0
# A graph replays what the GPU does without the host: up to here memory for its own pool is no matter.
LARGEST_GRAPH = 65536
GRAPH_REPLAYS = 30


class Harness:
    """Runs cases on one device.

    host_memory  measures peaks on the CPU; None leaves them out there
    seconds      how long the rounds of one case may go on beyond the least number
    say          told what runs now
    rounds       of every measurement at least; None: timing.LEAST_ROUNDS
    """

    def __init__(
        self,
        device: Device,
        host_memory: HostMemory | None,
        seconds: float,
        say: Callable[[str], None] = lambda _: None,
        rounds: int | None = None,
    ):
        self.device, self.host_memory, self.seconds, self.say = device, host_memory, seconds, say
        self.rounds = rounds or timing.LEAST_ROUNDS[device.kind]

    def run(self, case: Case, methods: list[Method] | None = None) -> list[Row]:
        """One row per method (all that can compute the case by default), with times where it is right and fits."""
        with self.device.precision(case.tf32):
            methods = methods_for(case, self.device) if methods is None else methods
            inputs = inputs_of(case, self.device.torch)
            self.say(f"float64 truth of {case.name}")
            truth = gate.truth_of(case, inputs)
            rows = {method.name: self._check(method, case, inputs, truth) for method in methods}
            del truth  # its float64 copies would narrow what fits
            for method in methods:
                if rows[method.name].status in (OK, TOO_SLOW):
                    rows[method.name] = self._measure_memory(rows[method.name], method, case)
            to_time = [method for method in methods if rows[method.name].status == OK]
            return list((rows | self._time(rows, to_time, case)).values())

    def _unmeasured(self, method: Method, case: Case) -> Row:
        row = Row(
            case.loss, method.name, method.is_ours, case.layout, case.n, case.m, case.dim, case.dtype, case.temperature
        )
        fits = method.estimated_bytes(case) <= MEMORY_SHARE * self.device.available_bytes()
        return row if fits else replace(row, status=OUT_OF_MEMORY)

    def _check(self, method: Method, case: Case, inputs: Inputs, truth: Truth) -> Row:
        self.say(f"checking {method.name}: {case.name}")
        row = self._unmeasured(method, case)
        if row.status != OK:
            return row
        began = time.perf_counter()
        try:
            ratio = gate.error_ratio(method, case, inputs, truth)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
                raise
            return replace(row, status=OUT_OF_MEMORY)
        seconds = time.perf_counter() - began
        if ratio > 1:
            return replace(row, gate=ratio, status=RED)
        if seconds > SLOWEST_CALL_S and not method.name.startswith(COMPILED.name):  # whose first call compiles
            return replace(row, gate=ratio, status=TOO_SLOW)
        return replace(row, gate=ratio)

    def _measure_memory(self, row: Row, method: Method, case: Case) -> Row:
        self.say(f"memory of {method.name}: {case.name}")
        if self.device.is_cuda:
            return replace(row, peak_extra_mib=peak_mib_cuda(method, case, self.device))
        # in a fresh process torch.compile would compile once more, tens of seconds for one number
        if self.host_memory is None or method.name.startswith(COMPILED.name):
            return row
        peak = self.host_memory.peak_mib(method, case)
        return replace(row, peak_extra_mib=peak) if peak is not None else replace(row, status=OUT_OF_MEMORY)

    def _time(self, rows: dict[str, Row], methods: list[Method], case: Case) -> dict[str, Row]:
        if not methods:
            return {}
        self.say(f"timing all in turns: {case.name}")
        inputs = timing.rotation(self.device, lambda seed: inputs_of(case, self.device.torch, seed))
        calls = {method.name: _call(method, case) for method in methods}
        gemm = self.device.gemm_tflops(case.products_dtype)
        timings = timing.interleave(self.device, calls, inputs, self.seconds, self.rounds)
        gemm = max(
            gemm, self.device.gemm_tflops(case.products_dtype)
        )  # of both sides: a neighbour may have held up one
        baselines = [method.name for method in methods if not method.is_ours]
        timed = {}
        for method in methods:
            row = replace(_with_times(rows[method.name], timings[method.name]), gemm_tflops=gemm)
            # the baselines multiply 16-bit inputs in fp32, which is not the rate measured here
            if method.is_ours or case.torch_dtype == torch.float32:
                row = _with_shares(row, method, case, self.device.processors)
            if method.is_ours:
                exponentials, memory = floors(method.name, case, self.device)
                row = replace(row, exp_floor_ms=exponentials, memory_floor_ms=memory)
            others = [name for name in baselines if name != method.name]
            row = replace(row, ratios={b: timing.ratio(timings[b], timings[method.name]) for b in others})
            if method.is_ours and self.device.is_cuda and case.n <= LARGEST_GRAPH:
                row = replace(row, graph_ms=self._replay(calls[method.name], inputs[0]))
            timed[method.name] = row
        return timed

    def _replay(self, call: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> float | None:
        """Median ms of forward + backward as a CUDA graph; None where the call cannot be captured."""
        leaves = inputs.leaves
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):  # capture wants warm caches and workspaces on a side stream
                torch.autograd.grad(call(inputs), leaves)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                torch.autograd.grad(call(inputs), leaves)
        except RuntimeError as error:
            self.say(f"no CUDA graph: {error}")
            return None
        marks = [self.device.mark()]
        for _ in range(GRAPH_REPLAYS):
            graph.replay()
            marks.append(self.device.mark())
        self.device.synchronize()
        return timing.quartiles([self.device.milliseconds(*p) for p in itertools.pairwise(marks)])[1]


def _call(method: Method, case: Case) -> Callable[[Inputs], torch.Tensor]:
    return lambda inputs: method.mean_loss(case, inputs)


def _with_times(row: Row, times: Timing) -> Row:
    forward, backward = timing.quartiles(times.forward), timing.quartiles(times.backward)
    return replace(
        row,
        forward_ms=forward[1],
        backward_ms=backward[1],
        forward_quartiles_ms=forward,
        backward_quartiles_ms=backward,
        total_quartiles_ms=timing.quartiles(times.total),
        rounds=len(times.forward),
    )


def _with_shares(row: Row, method: Method, case: Case, processors: int | None) -> Row:
    forward, backward = executed_flops(method.name, case, processors)
    gemm = row.gemm_tflops * 1e9  # flops per ms
    return replace(
        row,
        forward_gemm_share=forward / row.forward_ms / gemm,
        backward_gemm_share=backward / row.backward_ms / gemm if backward else None,
    )
