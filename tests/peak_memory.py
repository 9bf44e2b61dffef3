"""Growth of the peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import re, sys
from pathlib import Path
import torch
import contrastive_ext as ce
torch.set_num_threads(2)
def peak():  # of this program; ru_maxrss would begin with that of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def step(n):
    scope = {"torch": torch, "ce": ce, "n": n}
    exec(sys.argv[1], scope)
    before = peak()
    exec(sys.argv[2], scope)
    return peak() - before
step(int(sys.argv[3]))
print(step(int(sys.argv[4])))
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def peak_growth(setup: str, call: str, small: int, large: int) -> int:
    """Bytes by which `call` raises the peak over what `setup` left, for n = large; n = small warms up."""
    command = [sys.executable, "-c", _PROGRAM, setup, call, str(small), str(large)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
