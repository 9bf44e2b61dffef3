"""Every backend on every device it can run on, poisoned allocations, and fixed seeds."""

from __future__ import annotations

import os

# before torch starts its threads: on a busy machine spinning threads make small tests ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from contrastive_ext.backends import dispatch
from contrastive_ext.batch import queue
from contrastive_ext.losses import stats

pytest.register_assert_rewrite("native_code", "problems", "promises")  # what their asserts compare is shown too

DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def _runs() -> list:
    """(backend, device) for each streaming backend; a pair that cannot run is skipped with the backend's own reason."""
    params = []
    for backend in dispatch.BACKENDS:
        for device in DEVICES:
            reason = backend.why_not(device, torch.float32, torch.float32, 8)
            if reason is not None and backend.why_not(torch.device("cpu"), torch.float32, torch.float32, 8) is None:
                continue  # a CPU backend has no business on the GPU
            marks = [pytest.mark.skip(reason=reason)] if reason is not None else []
            if backend.name == "triton" and device.type == "cpu":
                marks.append(pytest.mark.interpreter)
            params.append(pytest.param((backend.name, device), id=f"{backend.name}-{device.type}", marks=marks))
    return params


@pytest.fixture(params=_runs())
def run(request) -> tuple[str, torch.device]:
    """A backend name and a device."""
    return request.param


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty hands out NaN: an output element that nobody writes cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    """Warnings that come once per process come once per test."""
    monkeypatch.setattr(stats, "_warned", False)
    monkeypatch.setattr(queue, "_warned", False)
    monkeypatch.setattr(queue, "_looked", False)
    monkeypatch.setattr(dispatch, "_announced", set())
