"""What the terminal shows: a progress line while it runs, one table at the end. rich draws both where installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from .case import Case, short_name
from .frontier import duration, frontier, rounded
from .results import OK, RED, Results, Row

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:  # a GPU machine without network has what it has
    rich = None  # type: ignore[assignment]

_COLUMNS = (
    "case", "method", "fwd ms", "bwd ms", "sum ms", "MiB", "GEMM TFLOP/s", "of GEMM, f / b", "gate",
)  # fmt: skip
_WIDTH_WITHOUT_TERMINAL = 160


class Progress:
    """A bar with what runs now; without a terminal one line per finished step. A context manager."""

    def __init__(self, total: int):
        self._total, self._done, self._began, self._bar = total, 0, time.monotonic(), None
        if rich is not None and sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.SpinnerColumn(),
                rich.progress.BarColumn(30),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """What runs now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def finish(self, text: str) -> None:
        """One step is done; `text` says how it ended."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(f"[{self._done}/{self._total}, {time.monotonic() - self._began:.0f} s] {text}", flush=True)


def one_line(rows: Sequence[Row]) -> str:
    """A finished case in a line: total time or status of every method."""
    first = rows[0]
    cells = [
        f"{r.backend} {r.total_quartiles_ms[1]:.1f} ms" if r.total_quartiles_ms else f"{r.backend} {r.status}"
        for r in rows
    ]
    return f"{_case(first)}: {', '.join(cells)}"


def show(results: Results) -> None:
    """The main job, the table of cases, the frontier, and the verdict."""
    for job in results.digits:
        _print(_digits_line(job), "green" if job["agrees"] else "bold red")
    ours = list(dict.fromkeys(row.backend for row in results.rows if row.is_ours))
    title = (
        "forward + backward; x: times slower than our backend of that name, with quartiles; gate: error over tolerance"
    )
    _table(title, (*_COLUMNS, *(f"x {name}" for name in ours)), _table_rows(results.rows, ours))
    memory = results.environment["available_memory_gib"]
    limits = frontier(results.rows, memory * 2**30)
    cells = [[x.backend, rounded(x.largest_n), duration(x.hours) if x.hours else ""] for x in limits]
    _table(
        f"largest N in {memory:g} GiB, from the measured peaks",
        ("method", "N", "one step there"),
        [(c, "") for c in cells],
    )
    if results.left_out:
        _print(f"Not timed because of the time limit: {'; '.join(results.left_out)}", "yellow")
    if not results.is_green:
        _print("RED: a result of the package differs from the reference beyond the tolerance.", "bold red")


def _digits_line(job: dict) -> str:
    before, after = job["probe_before"], job["probe_after"]
    used = ", ".join(
        f"{name} loss {job['max_loss_difference'][name]:.1e}, gradient {job['max_gradient_difference'][name]:.1e}, "
        f"{share:.2f} of the tolerance"
        for name, share in job["of_tolerance"].items()
    )
    verdict = "agrees with" if job["agrees"] else "DISAGREES with"
    return (
        f"digits, {short_name(job['loss'])}, {job['steps']} steps: {verdict} the reference ({used}); "
        f"loss {job['first_loss']:.3f} -> {job['last_loss']:.3f}, one-shot accuracy {before[0]:.3f} -> {after[0]:.3f} "
        f"(sd {after[1]:.3f} over draws), clamped rows {job['stats']['clamped_fraction']:.0%}"
    )


def _table_rows(rows: Sequence[Row], ours: Sequence[str]) -> list[tuple[list[str], str]]:
    ratios = {(_case(row), row.backend): row.ratios for row in rows}
    cells, previous = [], None
    for row in rows:
        case = _case(row)
        style = "bold red" if row.status == RED and row.is_ours else "cyan" if row.is_ours else ""
        beaten_by = [_ratio(ratios.get((case, name), {}).get(row.backend)) for name in ours]
        cells.append(([case if case != previous else "", row.backend, *_measurements(row), *beaten_by], style))
        previous = case
    return cells


def _measurements(row: Row) -> list[str]:
    # a baseline's tolerance only tells whether it is the same loss
    gate = f"{row.gate:.2f}" if row.gate is not None and (row.is_ours or row.status == RED) else ""
    peak = "" if row.peak_extra_mib is None else f"{row.peak_extra_mib:,.0f}"
    if row.status != OK or row.total_quartiles_ms is None:
        return [row.status, "", "", peak, "", "", gate]
    shares = [f"{share:.0%}" if share else "-" for share in (row.forward_gemm_share, row.backward_gemm_share)]
    return [
        _milliseconds(row.forward_ms), _milliseconds(row.backward_ms), _milliseconds(row.total_quartiles_ms[1]), peak,
        f"{row.gemm_tflops:.3g}" if row.gemm_tflops else "",
        " / ".join(shares) if row.forward_gemm_share else "", gate,
    ]  # fmt: skip


def _ratio(quartiles: Sequence[float] | None) -> str:
    if quartiles is None:
        return ""
    low, middle, high = quartiles
    return f"{middle:.2g} ({low:.2g}-{high:.2g})"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _case(row: Row) -> str:
    return Case(row.loss, row.layout, row.N, row.M, row.D, row.dtype, row.temperature).name


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[list[str], str]]) -> None:
    if rich is None:
        print(f"\n{title}\n" + "\n".join("  ".join(cells) for cells in [list(columns), *(cells for cells, _ in rows)]))
        return
    table = rich.table.Table(title=title, title_justify="left", box=rich.table.box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "method") else "right", no_wrap=name != "case")
    is_grouped = any(cells[0] == "" for cells, _ in rows)
    for i, (cells, style) in enumerate(rows):
        next_goes_on = any(cells[0] == "" for cells, _ in rows[i + 1 : i + 2])
        table.add_row(*cells, style=style, end_section=not next_goes_on and is_grouped)
    _console().print(table)


def _print(text: str, style: str) -> None:
    if rich is None:
        print(text)
    else:
        _console().print(text, style=style, markup=False, highlight=False)


def _console():
    return rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
