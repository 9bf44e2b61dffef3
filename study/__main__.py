"""python -m study: run the table of runs on all cores, write the results file, say what it comes to."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import contrastive_ext as ce

from . import docstrings, one, views
from .questions import DIGITS, STEPS, WHOLE, Run, runs
from .results import Results, departures

COMMITTED = Path(__file__).parents[1] / "bench" / "results" / "study.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "show"], default="run")
    parser.add_argument("file", nargs="?", type=Path, default=COMMITTED, help="of show")
    parser.add_argument("--site", type=Path, help="folder of the site: show draws its pictures and tables into it")
    parser.add_argument("--out", type=Path, default=Path("bench/results/local/study.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="regular expression on the names of questions and kinds of data")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out has, do the others")
    options = parser.parse_args(arguments)
    if options.command == "show":
        views.show(Results.read(options.file), options.site)
        return 0
    chosen = [r for r in runs(options.seeds, options.steps) if re.search(options.only, f"{r.question} {r.data}")]
    if not chosen:
        parser.error(f"no question matches {options.only!r}: {', '.join(dict.fromkeys(r.question for r in runs(1)))}.")
    results = Results.read(options.out) if options.resume else Results(_facts(options.seeds, options.steps), [])
    total, chosen = len(chosen), [run for run in chosen if run not in results]
    others = len(results.rows) + len(chosen) - total  # in the file, not asked for
    began = time.monotonic() - results.facts.get("seconds", 0)

    def take(done: tuple[Run, dict[str, float], float]) -> None:
        results.add(*done)
        results.facts["seconds"] = round(time.monotonic() - began)
        results.write(options.out)
        print(f"[{len(results.rows) - others}/{total}, {results.facts['seconds']} s] {_told(*done)}", flush=True)

    if any(run.data not in (DIGITS, WHOLE) for run in chosen):
        print("features of MiniLM, once", flush=True)
        docstrings.frozen_features()
    small = [run for run in chosen if run.data != WHOLE]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawned, initializer=one.alone) as pool:
        for future in as_completed([pool.submit(one.train, run) for run in small]):
            take(future.result())
    for run in chosen:
        if run.data == WHOLE:  # on all threads
            take(one.train(run))
    views.show(results, options.site)
    print(f"\n{len(results.rows)} runs in {results.facts['seconds']} s: {options.out}")
    if COMMITTED.exists() and options.out.resolve() != COMMITTED and options.steps == STEPS:
        apart = departures(results, Results.read(COMMITTED))
        print("\n".join(["means outside the committed spread:", *apart]) if apart else "within the committed spread")
    return 0


def _told(run: Run, metrics: dict[str, float], seconds: float) -> str:
    x = "" if run.x is None else f" at {run.x:g}"
    at = f"{run.label}{x}, t {run.temperature}, seed {run.seed}"
    return f"{run.question}: {at}: {metrics['score']:.1f} in {seconds:.0f} s"


def _facts(seeds: int, steps: int) -> dict[str, object]:
    return {
        "contrastive_ext": ce.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "cores": os.cpu_count(), "seeds": seeds, "steps": steps,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
