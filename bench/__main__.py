"""The benchmark's command line.

    python -m bench                        trainings on digits, time and memory of every case, a picture: five minutes
    python -m bench --long                 larger N, small batches, long queues, bfloat16 on top
    python -m bench --device cuda          the GPU protocol
    python -m bench show RESULTS.json      print a results file and draw its picture again
    python -m bench smoke                  correctness at tiny shapes
    python -m bench hosts                  losses of other libraries beside their adapters
    python -m bench batches                gradient cache and ring of processes: time and memory
    python -m bench mining                 the most similar columns, beside a product and topk: time and memory
    python -m bench negatives              how many negatives are enough: losses and bounds against the batch size
    python -m bench proof                  correctness at real shapes on a GPU, a JSON line a case
    python -m bench speed                  the table of goals on a GPU, kernel by kernel
    python -m bench tune                   times other tile sizes of the Triton kernels (a GPU)

A JSON file named after the device collects the results as they come, in bench/results/local or in the folder of --out.
Exit status 1 says that a result was wrong, 2 that the arguments were, 130 that Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import torch

from . import batches, environment, methods, mining, negatives
from .case import Case, short_name
from .cases import cpu_cases, cpu_long_cases, cuda_cases, proof_cases, smoke_cases, speed_cases, tiny
from .device import Device
from .hosts import hosts
from .losses import PAIR_LOSSES
from .memory import HostMemory
from .proof import prove
from .results import Results, write_json
from .run import STOPPED, run, show
from .smoke import smoke
from .speed import speed
from .tune import DTYPES, prefer, tune

_OUT = Path(__file__).parent / "results" / "local"  # ignored by git: what is committed is chosen by hand
_TIME_LIMIT_S = {"cpu": 240, "cuda": 1500}  # begin no case later: the CPU run promises five minutes
_LONG_TIME_LIMIT_S = 3600
_SPEED_LIMIT_S = 80.0
_SECONDS_PER_HOST = {False: 2.0, True: 0.2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if anything of ours is wrong."""
    options = _parser().parse_args(arguments)
    # the benchmark itself reports the clamped rows
    warnings.filterwarnings("ignore", message=".*on the floor of the debiased loss")
    try:
        return _command(options)
    except KeyboardInterrupt:
        print("\nStopped; what was found is above, and in the file where the command writes one.")
        return STOPPED


def _command(options: argparse.Namespace) -> int:
    if options.command == "show":
        return show(options.results, options.page, options.against)
    methods.left_out.update(options.without)
    if options.tiles is not None:
        prefer(options.tiles)
    if options.command == "negatives":
        return _negatives(options)
    if options.command == "batches":
        return _written(batches, options)
    if options.command == "mining":
        return _written(mining, options)
    if options.command is None:
        return _bench(options)
    device = Device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.command == "hosts":
        with contextlib.ExitStack() as stack:
            memory = None if device.is_cuda else stack.enter_context(HostMemory())
            peak = (lambda *_: None) if memory is None else memory.peak_mib_of_host
            return hosts(device, peak, _SECONDS_PER_HOST[options.quick], options.quick)
    if options.command == "smoke":
        return int(smoke(device, _share(smoke_cases(), options)) > 0)
    if options.command == "proof":
        index = options.shard[0] if options.shard else 0
        return int(prove(device, options.out / f"proof-{index}.jsonl", _share(proof_cases(), options)) > 0)
    if options.command == "speed":
        limit = options.time_limit or _SPEED_LIMIT_S
        return speed(device, options.out, limit, _share(speed_cases(), options), options.compile, options.against)
    return tune(device, options.features, options.rows, options.dtype, options.out, options.shard, options.most)


def _bench(options: argparse.Namespace) -> int:
    device = Device(options.device or "cpu")
    table = cuda_cases(options.quick) if device.is_cuda else cpu_cases(options.quick)
    if options.long and device.is_cuda:
        print("--long belongs to the CPU run; the GPU protocol has one length.", file=sys.stderr)
        return 2
    if options.long:
        table += cpu_long_cases()
    jobs = {f"digits {short_name(name)}": name for name in PAIR_LOSSES}
    chosen = _matching(options.only, [*jobs, *(case.name for case in table)])
    cases = [
        replace(case, peers=options.peers, compile=case.compile and options.compile)
        for case in table
        if case.name in chosen
    ]
    kind = "-quick" if options.quick else "-long" if options.long else ""
    path = options.out / f"{environment.slug(device)}{kind}.json"
    limit = options.time_limit or (_LONG_TIME_LIMIT_S if options.long else _TIME_LIMIT_S[device.kind])
    return run(
        device, cases, [jobs[name] for name in jobs if name in chosen], path, limit, options.quick, options.against
    )


def _matching(only: re.Pattern[str], names: Iterable[str]) -> list[str]:
    """The names that --only leaves; an error that lists them if it leaves none."""
    names = list(names)
    found = [name for name in names if only.search(name)]
    if not found:
        print(f"--only {only.pattern}: no such case. The cases are:", *names, sep="\n  ", file=sys.stderr)
        raise SystemExit(2)
    return found


def _share(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    """The cases that --only, --tiny and --shard leave."""
    names = _matching(options.only, [case.name for case in cases])
    chosen = [case for case in cases if case.name in names]
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
    write_json(facts | sweep, path)
    print(f"results: {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("The picture is left out: it needs matplotlib.")
        return 0
    negatives.draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"picture: {path.with_suffix('.png')}")
    return 0


def _written(command: ModuleType, options: argparse.Namespace) -> int:
    """Rows of a command with a file of its own, as they come and as JSON."""
    try:
        rows = command.measure(command.QUICK if options.quick else command.FULL, lambda text: print(text, flush=True))
    except RuntimeError as error:
        print(error)
        return 1
    path = options.out / f"{options.command}.json"
    write_json(environment.facts(Device("cpu")) | {"rows": [asdict(row) for row in rows]}, path)
    print(f"results: {path}")
    return 0


def _results(text: str) -> Results:
    try:
        return Results.read(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression; {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; smoke: the GPU if there is one")
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="where results go (bench/results/local)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes, few steps: a look, not a measurement")
    size.add_argument("--long", action="store_true", help="the CPU run with larger N and more: some 15 minutes")
    parser.add_argument("--peers", action="store_true", help="other libraries too, where they are installed")
    parser.add_argument(
        "--only", type=_regex, default=re.compile(""), metavar="REGEX", help="cases and digits jobs whose name matches"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="BACKEND", help="backends not to run")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="use the fastest tiles of a file of `tune`")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no case later")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile as baseline")
    parser.add_argument("--against", type=_results, metavar="FILE", help="say what changed since this results file")
    commands = parser.add_subparsers(
        dest="command", metavar="show | smoke | hosts | batches | mining | negatives | proof | speed | tune"
    )
    smoke_parser = commands.add_parser("smoke", help="correctness at tiny shapes, under 20 s")
    proof_parser = commands.add_parser("proof", help="real shapes against float64, repeats bit by bit: proof-<i>.jsonl")
    speed_parser = commands.add_parser("speed", help="the table of goals, kernel by kernel: speed.json, kernels.json")
    show_parser = commands.add_parser("show", help="print a results file and draw its picture again")
    for command in (smoke_parser, proof_parser, speed_parser):
        command.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS)
        command.add_argument(
            "--only", type=_regex, default=argparse.SUPPRESS, metavar="REGEX", help="cases whose name matches"
        )
        command.add_argument("--without", nargs="+", default=argparse.SUPPRESS, metavar="BACKEND")
        command.add_argument("--tiles", type=Path, default=argparse.SUPPRESS, metavar="FILE")
        if command is not speed_parser:
            command.add_argument("--shard", type=_shard, metavar="I/N", help="every N-th case from the I-th on")
        if command is not smoke_parser:
            command.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="DIR")
            command.add_argument("--tiny", action="store_true", help="the same cases at sizes for a rehearsal")
    host_parser = commands.add_parser("hosts", help="losses of other libraries, where installed, beside their adapters")
    host_parser.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS)
    host_parser.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)
    for command in (speed_parser, show_parser):
        command.add_argument("--against", type=_results, default=argparse.SUPPRESS, metavar="FILE")
    speed_parser.add_argument("--no-compile", dest="compile", action="store_false", default=argparse.SUPPRESS)
    speed_parser.add_argument("--time-limit", type=float, default=argparse.SUPPRESS, metavar="SECONDS")
    large = commands.add_parser("batches", help="gradient cache and ring of processes on this CPU: batches.json")
    mined = commands.add_parser("mining", help="most similar columns, a product and topk on this CPU: mining.json")
    for command in (large, mined):
        command.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="DIR")
        command.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)
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
    show_parser.add_argument("results", type=Path, metavar="RESULTS.json")
    show_parser.add_argument("--page", type=Path, metavar="FILE", help="put the table between the marks of this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
