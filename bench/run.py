"""The benchmark itself: short trainings on digits, every case of the table, then picture, table and a summary.

The results file is written after every step, so that whatever ends a run leaves what was known by then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

from . import digits, environment, plots, report
from .case import Case, short_name
from .device import Device
from .harness import Harness
from .memory import HostMemory
from .results import Results

MARKS = "<!-- cpu table -->\n", "<!-- end of cpu table -->"
STOPPED = 130  # exit status after Ctrl-C, as shells have it
_DIGITS_STEPS = {False: 20, True: 5}
_SECONDS_PER_CASE = {False: 1.0, True: 0.5}


def run(
    device: Device,
    cases: Sequence[Case],
    jobs: Sequence[str],
    path: Path,
    limit: float,
    quick: bool,
    against: Results | None = None,
) -> int:
    """Run jobs (losses to train with) and cases, begin none after `limit` seconds; 1 if a result was wrong."""
    if jobs and importlib.util.find_spec("sklearn") is None:
        print("The trainings on digits are left out: they need scikit-learn.")
        jobs = []
    results, began, stopped = Results(environment.facts(device)), time.monotonic(), False
    results.left_out = [case.name for case in cases]
    print(report.opening(results, len(cases), len(jobs), limit), end="\n\n", flush=True)
    progress = report.Progress(len(jobs) + len(cases))
    try:
        with contextlib.ExitStack() as stack:
            host_memory = None if device.is_cuda else stack.enter_context(HostMemory())
            stack.enter_context(progress)
            _run_digits(jobs, _DIGITS_STEPS[quick], device, results, path, progress)
            harness = Harness(device, host_memory, _SECONDS_PER_CASE[quick], progress.say)
            _run_cases(cases, harness, began + limit, results, path, progress)
    except KeyboardInterrupt:
        stopped = True
    results.seconds = round(time.monotonic() - began, 1)
    results.write(path)
    print(report.closing(results, write_views(results, path), _HINTS))
    if against is not None:
        print(report.comparison(results, against))
    if stopped:
        print(f"Stopped after {len(cases) - len(results.left_out)} of {len(cases)} cases.")
        return STOPPED
    return 0 if results.is_green else 1


_HINTS = (
    ("make bench ARGS=--long", "N up to 16,384, small batches, long queues, bfloat16, torch.compile; some 15 minutes"),
    ('make bench ARGS="show FILE.json"', "these lines and the picture again"),
    ("make bench ARGS=negatives", "how many negatives are enough, on digits or on your features"),
)


def show(path: Path, page: Path | None = None, against: Results | None = None) -> int:
    """Print the lines of a results file and draw its picture again; put its table between a page's marks."""
    try:
        results = Results.read(path)
    except (OSError, ValueError) as error:
        print(error)
        return 2
    for job in results.digits:
        print(report.digits_line(job))
    for rows in results.cases():
        print(report.group(rows))
    print(report.closing(results, write_views(results, path), _HINTS))
    if against is not None:
        print(report.comparison(results, against))
    if page is not None:
        before, _, rest = page.read_text().partition(MARKS[0])
        page.write_text(before + MARKS[0] + report.markdown(results) + MARKS[1] + rest.split(MARKS[1])[1])
    return 0


def write_views(results: Results, path: Path) -> list[Path]:
    """The picture and the site's table beside the results file; the paths of all of them."""
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(report.markdown(results))
    if importlib.util.find_spec("matplotlib") is None:
        print("The picture is left out: it needs matplotlib.")
        return [path, table]
    return [path, table, picture] if plots.draw(results, picture) else [path, table]


def _run_digits(
    jobs: Sequence[str], steps: int, device: Device, results: Results, path: Path, progress: report.Progress
) -> None:
    for name in jobs:
        progress.say(f"digits {short_name(name)}: {steps} steps, each compared with the reference")
        results.digits.append(digits.train(name, steps, device))
        results.write(path)
        progress.finish(report.digits_line(results.digits[-1]))


def _run_cases(
    cases: Sequence[Case], harness: Harness, deadline: float, results: Results, path: Path, progress: report.Progress
) -> None:
    for case in cases:
        if time.monotonic() > deadline:
            return
        rows = harness.run(case)
        results.add(rows)
        results.left_out.remove(case.name)
        results.write(path)
        progress.finish(report.group(rows))
