"""The benchmark's command line: the main job on real data, then time and memory of every case, one table, one picture.

    python -m bench                        the CPU run, under five minutes
    python -m bench --device cuda          the GPU protocol
    python -m bench smoke                  correctness at tiny shapes
    python -m bench negatives              how many negatives are enough: losses and bounds against the batch size
    python -m bench proof                  correctness at real shapes on a GPU, a JSON line a case
    python -m bench speed                  the table of goals on a GPU, kernel by kernel
    python -m bench tune                   times other tile sizes of the Triton kernels (a GPU)
    python -m bench plot RESULTS.json      draw the picture again

A JSON file named after the device collects the results as they come. Exit status 1 says that a result was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import digits, environment, methods, negatives, plots, report
from .case import Case
from .cases import cpu_cases, cuda_cases, proof_cases, smoke_cases, speed_cases, tiny
from .device import Device
from .harness import Harness
from .losses import PAIR_LOSSES, dense_of
from .memory import HostMemory
from .proof import prove
from .results import Results
from .smoke import smoke
from .speed import speed
from .tune import DTYPES, prefer, tune

_OUT = Path(__file__).parent / "results"
_DIGITS_STEPS = {False: 40, True: 5}
_TIME_LIMIT_S = {"cpu": 270, "cuda": 1500}  # the CPU run promises five minutes, picture and table included
_SPEED_LIMIT_S = 80.0
_SECONDS_PER_CASE = {False: 3.0, True: 0.5}
_FIXED_S = 4.0  # of a case, whatever its size
_MEMORY_SHARE_OF_TIME = 0.2  # of a case: one call of each method


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if anything of ours is wrong."""
    options = _parser().parse_args(arguments)
    # the benchmark itself reports the clamped rows
    warnings.filterwarnings("ignore", message=".*on the floor of the debiased loss")
    if options.command == "plot":
        return _plot(options.results)
    methods.left_out.update(options.without)
    if options.tiles is not None:
        prefer(options.tiles)
    if options.command == "negatives":
        return _negatives(options)
    if options.command is None:
        return _bench(options)
    device = Device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.command == "smoke":
        return int(smoke(device, _share(smoke_cases(), options)) > 0)
    if options.command == "proof":
        index = options.shard[0] if options.shard else 0
        return int(prove(device, options.out / f"proof-{index}.jsonl", _share(proof_cases(), options)) > 0)
    if options.command == "speed":
        return speed(device, options.out, options.time_limit or _SPEED_LIMIT_S, _share(speed_cases(), options))
    return tune(device, options.features, options.rows, options.dtype, options.out, options.shard, options.most)


def _share(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    """The cases that --only, --tiny and --shard leave."""
    chosen = [case for case in cases if re.search(options.only, case.name)]
    index, count = getattr(options, "shard", None) or (0, 1)
    chosen = chosen[index::count]
    return [tiny(case) for case in chosen] if getattr(options, "tiny", False) else chosen


def _shard(text: str) -> tuple[int, int]:
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError("expected i/n with 0 <= i < n")
    return index, count


def _negatives(options: argparse.Namespace) -> int:
    device = Device(options.device or "cpu")
    if options.features is None and importlib.util.find_spec("sklearn") is None:
        print("The sweep on digits needs scikit-learn; --features FILE.npz takes features of your own.")
        return 1
    name = "digits" if options.features is None else options.features.stem
    path, facts = options.out / f"negatives-{name}.json", environment.facts(device)
    if options.features is None:
        sweep = negatives.sweep_digits(device, options.quick)
    else:
        try:
            features = negatives.load_features(options.features, device)
        except (OSError, ValueError) as error:
            print(error)
            return 1
        sweep = negatives.sweep_features(features, options.temperature, name)
    negatives.write(sweep, facts, path)
    print(f"results: {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("The picture is left out: it needs matplotlib.")
        return 0
    negatives.draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"picture: {path.with_suffix('.png')}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    device = Device(options.device or "cpu")
    limit = options.time_limit or _TIME_LIMIT_S[device.kind]
    table = (cuda_cases if device.is_cuda else cpu_cases)(options.quick)
    cases = [replace(case, peers=options.peers) for case in table if re.search(options.only, case.name)]
    jobs = [name for name in PAIR_LOSSES if re.search(options.only, f"digits {name}")]
    path = options.out / f"{environment.slug(device)}.json"
    results, began = Results(environment.facts(device)), time.monotonic()
    with contextlib.ExitStack() as stack:
        host_memory = None if device.is_cuda else stack.enter_context(HostMemory())
        progress = stack.enter_context(report.Progress(len(jobs) + len(cases)))
        _run_digits(jobs, _DIGITS_STEPS[options.quick], device, results, path, progress)
        harness = Harness(device, host_memory, _SECONDS_PER_CASE[options.quick], progress.say)
        _run_cases(cases, harness, began + limit, results, path, progress)
    results.seconds = round(time.monotonic() - began, 1)
    results.write(path)
    report.show(results)
    print(f"results: {path}")
    _plot(path)
    return 0 if results.is_green else 1


def _run_digits(
    jobs: Sequence[str], steps: int, device: Device, results: Results, path: Path, progress: report.Progress
) -> None:
    if jobs and importlib.util.find_spec("sklearn") is None:
        print("The main job on digits is left out: it needs scikit-learn.")
        return
    for name in jobs:
        progress.say(f"digits: {steps} steps with {name}, each compared with the reference")
        job = digits.train(name, steps, device)
        results.digits.append(job)
        results.write(path)
        progress.finish(f"digits {name}: {'agrees' if job['agrees'] else 'DISAGREES'}")


def _run_cases(
    cases: Sequence[Case], harness: Harness, deadline: float, results: Results, path: Path, progress: report.Progress
) -> None:
    pace = 0.0  # seconds per unit of work in the last case, as busy as the machine is now
    for case in cases:
        began = time.monotonic()
        if began + _FIXED_S + pace * _work(case) <= deadline:
            rows = harness.run(case)
            if not case.compile:  # compiling says nothing about the next case
                pace = max(0.0, time.monotonic() - began - _FIXED_S) / _work(case)
        else:
            results.left_out.append(case.name)
            has_time = began + _FIXED_S + _MEMORY_SHARE_OF_TIME * pace * _work(case) <= deadline
            rows = harness.run_memory(case) if has_time else []
        for row in rows:
            results.rows.append(row)
            if row.gemm_tflops:
                results.gemm_tflops[row.dtype] = max(results.gemm_tflops.get(row.dtype, 0.0), row.gemm_tflops)
        results.write(path)
        progress.finish(report.one_line(rows) if rows else f"{case.name}: left out")


def _work(case: Case) -> float:
    return float(case.n) * case.m * (len(dense_of(case).exponents) + case.dim / 128)


def _plot(path: Path) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        print("The picture is left out: it needs matplotlib.")
        return 0
    picture = path.with_suffix(".png")
    plots.draw(Results.read(path), picture)
    print(f"picture: {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; smoke: the GPU if there is one")
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="where results go (bench/results)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps: a look, not a measurement")
    parser.add_argument("--peers", action="store_true", help="other libraries too, where they are installed")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases and digits jobs whose name matches")
    parser.add_argument("--without", nargs="+", default=[], metavar="BACKEND", help="backends not to run")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="use the fastest tiles of a file of `tune`")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no case that would end later")
    commands = parser.add_subparsers(dest="command", metavar="smoke | proof | speed | negatives | tune | plot")
    smoke_parser = commands.add_parser("smoke", help="correctness at tiny shapes, under 20 s")
    proof_parser = commands.add_parser("proof", help="real shapes against float64, repeats bit by bit: proof-<i>.jsonl")
    speed_parser = commands.add_parser("speed", help="the table of goals, kernel by kernel: speed.json, kernels.json")
    for command in (smoke_parser, proof_parser, speed_parser):
        command.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS)
        command.add_argument("--only", default=argparse.SUPPRESS, metavar="REGEX", help="cases whose name matches")
        command.add_argument("--without", nargs="+", default=argparse.SUPPRESS, metavar="BACKEND")
        command.add_argument("--tiles", type=Path, default=argparse.SUPPRESS, metavar="FILE")
        if command is not speed_parser:
            command.add_argument("--shard", type=_shard, metavar="I/N", help="every N-th case from the I-th on")
        if command is not smoke_parser:
            command.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="DIR")
            command.add_argument("--tiny", action="store_true", help="the same cases at sizes for a rehearsal")
    speed_parser.add_argument("--time-limit", type=float, default=argparse.SUPPRESS, metavar="SECONDS")
    sweep = commands.add_parser(
        "negatives", help="contrastive and supervised loss, both bounds and accuracy against the number of negatives"
    )
    sweep.add_argument(
        "--features", type=Path, metavar="FILE.npz",
        help="views [V, n, D], V >= 2 augmentations of the same n images, and labels [n]; default: train on digits",
    )  # fmt: skip
    sweep.add_argument("--temperature", type=float, default=0.5, help="of the losses on --features (0.5)")
    sweep.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS)
    sweep.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="DIR")
    sweep.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)
    tuning = commands.add_parser("tune", help="time other tile sizes of the Triton kernels, InfoNCE forward + backward")
    tuning.add_argument("--features", type=int, nargs="+", default=[128, 256, 512, 1024], metavar="D")
    tuning.add_argument("--rows", type=int, default=32768, metavar="N", help="anchors, 2B (32768)")
    tuning.add_argument("--dtype", choices=DTYPES, default="fp16")
    tuning.add_argument("--most", type=int, metavar="N", help="other tiles of a kernel at most")
    tuning.add_argument("--shard", type=_shard, metavar="I/N", help="run every N-th tile once and time none")
    tuning.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS)
    tuning.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="DIR")
    plot_parser = commands.add_parser("plot", help="draw the picture of a results file again")
    plot_parser.add_argument("results", type=Path, metavar="RESULTS.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
