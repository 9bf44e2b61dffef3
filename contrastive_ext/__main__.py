"""`python -m contrastive_ext doctor`: what is installed, which backends run here, what hardware has proven."""

from __future__ import annotations

import argparse
import importlib.util
import platform

import torch

from . import __version__, dispatch, native
from .explain import explain_for


def doctor() -> str:
    """A report of versions, devices, backends with their reasons, and the verified-on-hardware table."""
    lines = [
        f"contrastive_ext {__version__}, torch {torch.__version__}",
        f"Python {platform.python_version()}, {platform.machine()}",
        f"triton: {_version('triton')}",
        f"native library: {native.library() or native.why_missing()}",
    ]
    if native.why_missing() is None:
        lines += [f"  {name}: {value}" for name, value in native.build_info().items()]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        lines.append(f"GPU: {torch.cuda.get_device_name()} ({dispatch.architecture(devices[-1])})")
    else:
        lines.append("GPU: none that torch can use")
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            lines += [
                "",
                f"{device.type}, {str(dtype).removeprefix('torch.')}, D = 128",
                str(explain_for(device, dtype, 128)),
            ]
    lines += ["", "verified on hardware:"]
    lines += [
        f"  {backend} on {arch}, {dtype}: bench/results/{file}"
        for (backend, arch, dtype), file in dispatch.VERIFIED.items()
    ] or ["  no GPU kernels yet"]
    return "\n".join(lines)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Parse the command line and print the report."""
    parser = argparse.ArgumentParser(prog="python -m contrastive_ext", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="print the report")
    parser.parse_args()
    print(doctor())


if __name__ == "__main__":
    main()
