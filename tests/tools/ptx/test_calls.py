"""Whole losses by the launches of the `triton` backend on the machine: two of `make ptx ARGS=--all`'s."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from repository import ROOT


def test_losses_and_gradients_are_right_on_both_architectures():
    """In a process of its own: a CPU is made to look like a GPU."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ptx", "--only", "^calls sm_80|^calls sm_90 by descriptors"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": "tools", "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 lines\nthe machine is green" in done.stdout
