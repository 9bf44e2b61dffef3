"""What a results file says about the machine and the code it measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import contrastive_ext
from contrastive_ext.backends import dispatch

from .device import Device

_ROOT = Path(__file__).resolve().parents[1]


def facts(device: Device) -> dict[str, Any]:
    """Device, versions, commit and load, ready for JSON."""
    return {
        "device": device_name(device),
        "architecture": dispatch.architecture(device.torch),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.is_cuda
        else None,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "contrastive_ext": contrastive_ext.__version__,
        "backends": contrastive_ext.available_backends(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "available_memory_gib": round(device.available_bytes() / 2**30, 1),
    }


def device_name(device: Device) -> str:
    """The model of the GPU or of the CPU."""
    return torch.cuda.get_device_name() if device.is_cuda else cpu_model()


def slug(device: Device) -> str:
    """File name of the device's results: "cpu-amd-epyc-9654", "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    words = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return words if device.is_cuda else f"cpu-{words}"


def cpu_model() -> str:
    """Model name as the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
