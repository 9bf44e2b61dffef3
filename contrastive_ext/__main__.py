"""Fused contrastive losses with reweighted negatives, for PyTorch. Two commands:

python -m contrastive_ext doctor
    what is installed, which backends run, what hardware has proven

python -m contrastive_ext negatives --classes 100
    what a batch size means for a data set of 100 classes
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__
from .backends import dispatch, native
from .diagnostics.explain import explain_for
from .theory import report

MOST_CLASSES = 10**8
NARROWEST = 80  # columns of a terminal that the tables are made for


def facts() -> dict[str, Any]:
    """Versions, devices, the native library; for each device and dtype every backend and why it cannot run, or None."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    return {
        "contrastive_ext": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "triton": _version("triton"),
        "native_library": native.library() and str(native.library()),
        "native_missing": native.why_missing(),
        "native_build": native.build_info() if native.why_missing() is None else None,
        "gpu": f"{torch.cuda.get_device_name()} ({dispatch.architecture(devices[-1])})" if len(devices) > 1 else None,
        "backends": {
            f"{device.type}, {str(dtype).removeprefix('torch.')}": explain_for(device, dtype, 128)
            for device in devices
            for dtype in (torch.float32, torch.bfloat16)
        },
        "verified": {
            f"{backend} on {arch}, {dtype}": f"bench/results/{file}"
            for (backend, arch, dtype), file in dispatch.VERIFIED.items()
        },
    }


def doctor() -> str:
    """The facts as a report."""
    found = facts()
    lines = [
        f"contrastive_ext {found['contrastive_ext']}, torch {found['torch']}",
        f"Python {found['python']}, {found['machine']}",
        f"triton: {found['triton']}",
        f"native library: {found['native_library'] or found['native_missing']}",
    ]
    lines += [f"  {name}: {value}" for name, value in (found["native_build"] or {}).items()]
    lines.append(f"GPU: {found['gpu'] or 'none that torch can use'}")
    for problem, explanation in found["backends"].items():
        lines += ["", f"{problem}, D = 128", str(explanation)]
    verified = [f"  {what}: {file}" for what, file in found["verified"].items()]
    return "\n".join([*lines, "", "verified on hardware:", *(verified or ["  no GPU kernels yet"])])


def as_json() -> str:
    """The facts for a program, or for an issue."""
    return json.dumps(facts(), indent=1, default=asdict)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib.metadata import version

    return version(package)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_ext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"contrastive_ext {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="doctor | negatives")
    of_doctor = commands.add_parser("doctor", help="versions, devices, backends with their reasons")
    of_doctor.add_argument("--json", action="store_true", help="the same as JSON, for an issue")
    negatives = commands.add_parser("negatives", help="coverage, collisions, tau_plus and memory by batch size")
    classes = negatives.add_mutually_exclusive_group(required=True)
    classes.add_argument("--classes", type=int, metavar="C", help="number of classes, equally frequent")
    classes.add_argument("--counts", type=Path, metavar="CSV", help="class counts, the last column of every line")
    negatives.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="rows of the table")
    negatives.add_argument("--dim", type=int, default=128, help="features D, for the memory (128)")
    negatives.add_argument("--plot", type=Path, metavar="PNG", help="also draw the coverage curve (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        print(as_json() if options.json else _fit(doctor()))
    elif options.command == "negatives":
        print(_fit(_negatives(options, negatives.error)))
    else:
        parser.print_help()


def _fit(text: str) -> str:
    """Lines broken where the terminal ends; what goes on stands below the line's second column, if it has two."""
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    lines = []
    for line in text.splitlines():
        first_column = re.match(r" *\S+(?: \S+)* {2,}| *", line)
        assert first_column is not None  # the second alternative matches anything
        indent = " " * (first_column.end() or 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def _negatives(options: argparse.Namespace, fail: Callable[[str], NoReturn]) -> str:
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib, which is not installed: pip install 'contrastive_ext[bench]'.")
    if options.classes is not None and not 1 <= options.classes <= MOST_CLASSES:
        fail(f"--classes must be 1 to {MOST_CLASSES:,}; got {options.classes}.")
    if min(options.batch_sizes or [1]) < 1 or options.dim < 1:
        fail("--batch-sizes and --dim must be at least 1.")
    try:
        prior = torch.ones(options.classes) if options.counts is None else report.read_counts(options.counts)
        text = report.table(prior, options.batch_sizes, options.dim)
        if options.plot is not None:
            report.draw(prior, options.plot)
            text += f"\n\npicture: {options.plot}"
    except (OSError, ValueError, ArithmeticError) as error:
        fail(str(error))
    return text


if __name__ == "__main__":
    main()
