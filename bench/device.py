"""One interface to the CPU and the GPU: a clock, the memory that is left, caches, matrix products at library speed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
_GEMM_REPEATS = 5


class Device:
    """Where a benchmark runs. `mark` notes a time on the device's own clock, `milliseconds` reads two marks."""

    def __init__(self, kind: str):
        self.kind = kind
        self.torch = torch.device(kind)

    @property
    def is_cuda(self) -> bool:
        """Whether calls return before their work is done."""
        return self.kind == "cuda"

    def synchronize(self) -> None:
        """Wait for all work."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def mark(self):
        """A point in time, in the order of the work and not of the host."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        """Time between two marks; `synchronize` first."""
        return start.elapsed_time(end) if self.is_cuda else 1e3 * (end - start)

    def available_bytes(self) -> int:
        """Memory a call may still take."""
        if self.is_cuda:
            return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return _available_host_bytes()

    @property
    def processors(self) -> int | None:
        """Of a GPU."""
        return torch.cuda.get_device_properties(self.torch).multi_processor_count if self.is_cuda else None

    def cache_bytes(self) -> int:
        """The last cache shared by all cores: inputs are rotated so that together they exceed it."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.torch).L2_cache_size
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        return int(size.read_text().strip().removesuffix("K")) * 1024 if size.is_file() else 32 * 2**20

    @contextlib.contextmanager
    def precision(self, tf32: bool) -> Iterator[None]:
        """Allow TF32 products inside, or forbid them."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def gemm_tflops(self, dtype: torch.dtype) -> float:
        """Median rate of the library's square product; it moves with load and clocks: measured beside every case."""
        size = _GEMM_SIZE[self.kind]
        a, b, out = (torch.randn(size, size, device=self.torch).to(dtype) for _ in range(3))
        torch.mm(a, b, out=out)
        marks = [self.mark()]
        for _ in range(_GEMM_REPEATS):
            torch.mm(a, b, out=out)
            marks.append(self.mark())
        self.synchronize()
        times = sorted(self.milliseconds(*pair) for pair in itertools.pairwise(marks))
        return 2 * size**3 / times[len(times) // 2] / 1e9

    def exponentials_per_s(self, per_cycle: int) -> float | None:
        """Of a GPU whose processors make so many in a cycle, at its highest clock; None where nobody says that."""
        if self.processors is None or self._clock_hz() is None:
            return None
        return per_cycle * self.processors * self._clock_hz()

    @cache  # noqa: B019 (a run has one device)
    def _clock_hz(self) -> float | None:
        command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        try:
            return 1e6 * float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None

    @cache  # noqa: B019
    def copy_bytes_per_s(self) -> float:
        """Bytes read and written by a copy that no cache holds."""
        size = (1 << 30) if self.is_cuda else max(64 << 20, 2 * self.cache_bytes())
        source = torch.ones(size, dtype=torch.uint8, device=self.torch)
        target = torch.empty_like(source)
        marks = [self.mark()]
        for _ in range(_GEMM_REPEATS):
            target.copy_(source)
            marks.append(self.mark())
        self.synchronize()
        times = sorted(self.milliseconds(*pair) for pair in itertools.pairwise(marks))
        return 2 * size / times[len(times) // 2] * 1e3


def _available_host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit, where there is one
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(limit.with_name("memory.current").read_text()))
    return free
