"""One training, in whatever process."""

from __future__ import annotations

import time

import torch

from . import digits, docstrings
from .questions import DIGITS, Run


def alone() -> None:
    """A process that shares the machine with as many others as it has cores."""
    torch.set_num_threads(1)


def train(run: Run) -> tuple[Run, dict[str, float], float]:
    """The run, its metrics, seconds."""
    start = time.monotonic()
    metrics = (digits if run.data == DIGITS else docstrings).train(run)
    return run, metrics, time.monotonic() - start
