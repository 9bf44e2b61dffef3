"""Peak memory of one forward + backward beyond its inputs (gradients included).

On the GPU the allocator counts. On the CPU every measurement runs in a child process of its own, forked from a server
that has imported torch and computed nothing, so that no memory freed earlier hides the growth; the child makes the
inputs, runs the same method once on a tiny case, and then reads how far the resident set grew over that state.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from . import hosts
from .case import Case, Inputs
from .device import Device
from .losses import inputs_of
from .methods import Method, find_method

_ROOT = Path(__file__).resolve().parents[1]
# glibc returns blocks from this size on to the system at once. By default it adapts, keeps blocks up to 32 MiB and
# fragments: the 95 MiB that `chunked` holds at N = 16,384 then read as 784 to 1031 MiB, different every time.
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_TINY = {"two_view": (64, 64), "symmetric": (32, 32), "queue": (32, 64)}


class HostMemory:
    """Client of the server process; a context manager."""

    def __enter__(self) -> HostMemory:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "bench.memory"], cwd=_ROOT, env=os.environ | RETURN_BLOCKS | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, error, *_) -> None:
        if error is not None:  # Ctrl-C does not reach a session of its own: end it with the call it measures
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.stdin.close()
        self._server.wait()

    def peak_mib(self, method: Method, case: Case) -> float | None:
        """MiB beyond the inputs; None if the call did not survive."""
        return self._ask({"method": method.name, "case": asdict(case)})

    def peak_mib_of_host(self, index: int, who: str, batch: int) -> float | None:
        """The same of a loss of HOSTS (hosts.py)."""
        return self._ask({"host": index, "who": who, "batch": batch})

    def _ask(self, request: dict) -> float | None:
        self._server.stdin.write(json.dumps(request | {"threads": torch.get_num_threads()}) + "\n")
        return json.loads(self._server.stdout.readline())


def peak_mib_cuda(method: Method, case: Case, device: Device) -> float:
    """MiB the allocator handed out at the peak beyond the inputs."""
    inputs = inputs_of(case, device.torch)
    _run(method, case, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(method, case, inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _run(method: Method, case: Case, inputs: Inputs) -> None:
    _gradients(partial(method.mean_loss, case), inputs)


def _gradients(mean_loss: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> None:
    torch.autograd.grad(mean_loss(inputs), inputs.leaves)


def _serve() -> None:
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, json.dumps(_measure(json.loads(line))).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = answer.read()  # empty if the child was killed
        os.waitpid(child, 0)
        print(text or "null", flush=True)


def _measure(request: dict) -> float:
    torch.set_num_threads(request["threads"])
    (small, few), (mean_loss, inputs) = _host_calls(request) if "host" in request else _case_calls(request)
    _gradients(small, few)
    with contextlib.suppress(OSError):  # where the peak cannot be reset it can only be overstated
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    _gradients(mean_loss, inputs)
    return max(0.0, (resident_kib("VmHWM") - before) / 1024)


_Call = tuple[Callable[[Inputs], torch.Tensor], Inputs]


def _case_calls(request: dict) -> tuple[_Call, _Call]:
    """A tiny call that loads what the method needs, and the one to measure, each with its inputs."""
    device, case = Device("cpu"), Case(**request["case"])
    method = find_method(request["method"], case, device)
    inputs = inputs_of(case, device.torch)
    n, m = _TINY.get(case.layout, _TINY["queue"])
    tiny = replace(case, n=n, m=m)
    return (partial(method.mean_loss, tiny), inputs_of(tiny, device.torch)), (partial(method.mean_loss, case), inputs)


def _host_calls(request: dict) -> tuple[_Call, _Call]:
    call, host = hosts.call_of(request["host"], request["who"]), hosts.HOSTS[request["host"]]
    few, inputs = (hosts.inputs_of(host, batch, torch.device("cpu")) for batch in (8, request["batch"]))
    return (call, few), (call, inputs)


def resident_kib(field: str) -> float:
    """This process's resident set, VmRSS, or its peak, VmHWM."""
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS: the peak only, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return float(line.split()[1])


if __name__ == "__main__":
    _serve()
