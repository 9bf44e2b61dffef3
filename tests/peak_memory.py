"""Growth of the peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As in bench/memory.py: glibc keeps freed blocks up to 32 MiB and fragments, what is held then reads differently every
# time; and a fork of a process that has computed nothing has no memory freed earlier to hide the growth.
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_PROGRAM = """
import os, re, sys
from pathlib import Path
import torch
import contrastive_ext as ce
torch.set_num_threads(2)
setup, call, small, *sizes = sys.argv[1:]
def resident(field):  # of this program; ru_maxrss would begin with that of the process that started it
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def step(n):
    scope = {"torch": torch, "ce": ce, "n": n}
    exec(setup, scope)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
    except OSError:
        before = resident("VmHWM")
    exec(call, scope)
    return resident("VmHWM") - before
for n in sizes:
    child = os.fork()
    if child == 0:
        step(int(small))
        print(step(int(n)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"n = {n} failed")
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def peak_growths(setup: str, call: str, small: int, *sizes: int) -> list[int]:
    """Bytes by which `call` raises the peak over what `setup` left, for n of every size; n = small warms up."""
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, setup, call, *map(str, (small, *sizes))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | RETURN_BLOCKS)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines()]


def peak_growth(setup: str, call: str, small: int, large: int) -> int:
    """`peak_growths` for one size."""
    (growth,) = peak_growths(setup, call, small, large)
    return growth
