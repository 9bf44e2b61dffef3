"""What the terminal shows: a moving line while it runs, a group of lines for every case, what it comes to at the end.

A line says what it counts, so that no heading scrolls away: method, milliseconds, MiB, times faster than eager and than
chunked PyTorch. These are never cut; more stands to their right as far as the terminal is wide.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .case import short_name
from .frontier import frontier, rounded
from .losses import LOSSES
from .results import RED, Results, Row

_WIDTH_WITHOUT_TERMINAL = 160
_METHOD, _CELLS = 17, ((9, " ms"), (8, " MiB"), (7, "x eager"), (7, "x chunked"))
_BOLD, _CYAN, _RED, _GREEN = "1", "36", "1;31", "32"


def width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL


class Progress:
    """One line with what runs now, rewritten in place; without a terminal only finished steps. A context manager."""

    def __init__(self, total: int):
        self._total, self._done, self._began, self._moves = total, 0, time.monotonic(), sys.stdout.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._clear()

    def say(self, text: str) -> None:
        """What runs now."""
        if self._moves:
            self._clear()
            print(f"{self._where} {text}"[: width() - 1], end="", flush=True)

    def finish(self, text: str) -> None:
        """One step is done; `text` says how it ended."""
        self._done += 1
        self._clear()
        print(text if self._moves else f"{self._where} {text}", flush=True)

    @property
    def _where(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"[{self._done}/{self._total}, {minutes}:{seconds:02}]"

    def _clear(self) -> None:
        if self._moves:
            print("\r\x1b[K", end="")


def group(rows: Sequence[Row], columns: int | None = None) -> str:
    """A case: its name as title, then a line for every method."""
    lines = [_styled(rows[0].case_name, _BOLD)]
    for row in rows:
        style = _RED if row.status == RED and row.is_ours else _CYAN if row.is_ours else ""
        lines.append(_styled(_line(row, columns or width()), style))
    return "\n".join(lines)


def _line(row: Row, columns: int) -> str:
    line = f"  {row.backend:<{_METHOD}}"
    if row.total_quartiles_ms is None:
        peak = f", {row.peak_extra_mib:,.0f} MiB" if row.peak_extra_mib is not None else ""
        return f"{line} {row.status}{peak}" + (f", {row.gate:.2g} of the tolerance" if row.status == RED else "")
    numbers = (
        milliseconds(row.total_quartiles_ms[1]),
        "" if row.peak_extra_mib is None else f"{row.peak_extra_mib:,.0f}",
        times(row, "eager"),
        times(row, "chunked"),
    )
    for number, (size, unit) in zip(numbers, _CELLS, strict=True):
        line += f"{number:>{size}}{unit}" if number else " " * (size + len(unit))
    for size, cell in _MORE:
        if len(line) + size > columns:
            break
        line += f"{cell(row):>{size}}"
    return line.rstrip()


def _parts(row: Row) -> str:
    return f"{milliseconds(row.forward_ms)} + {milliseconds(row.backward_ms)} ms"


def _tolerance(row: Row) -> str:
    return f"err/tol {row.gate:.2f}" if row.is_ours and row.gate is not None else ""


def _shares(row: Row) -> str:
    shares = [f"{share:.0%}" if share else "-" for share in (row.forward_gemm_share, row.backward_gemm_share)]
    return f"{'/'.join(shares)} of GEMM" if row.forward_gemm_share else ""


def _spread(row: Row) -> str:
    low, _, high = row.ratios.get("eager", (0, 0, 0))
    return f"quartiles {low:.2g}-{high:.2g}x eager" if high else ""


# to the right of the four numbers, where there is room: forward + backward, error of loss and gradient, rate, spread
_MORE: tuple[tuple[int, Callable[[Row], str]], ...] = ((17, _parts), (16, _tolerance), (17, _shares), (28, _spread))


def times(row: Row, baseline: str) -> str:
    """How many times faster than a baseline; nothing where both were not timed."""
    if baseline not in row.ratios:
        return ""
    ratio = row.ratios[baseline][1]
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def digits_line(job: dict) -> str:
    """How a training run on digits went."""
    verdict = f"all {job['steps']} steps right" if job["agrees"] else "WRONG"
    accuracy = f"one-shot accuracy {job['probe_before'][0]:.2f} -> {job['probe_after'][0]:.2f}"
    line = f"digits {short_name(job['loss'])}: {verdict}, {accuracy}"
    return _styled(line, _GREEN if job["agrees"] else _RED)


def opening(results: Results, cases: int, jobs: int, limit: float) -> str:
    """What is going to happen, and how to read it."""
    facts = results.environment
    return _wrapped(
        f"{_count(cases, 'case')} and {_count(jobs, 'short training')} on {facts['device']}, {facts['num_threads']} "
        f"threads, torch {facts['torch']}; nothing is begun after {limit / 60:.0f} minutes. Every "
        "result is checked against float64 before it is timed. A line is forward + backward of the loss: time, peak "
        "memory beyond the inputs, times faster than the eager formula and than the same in chunks that are computed "
        "again in the backward."
    )


def closing(results: Results, files: Sequence[Path], hints: Sequence[tuple[str, str]]) -> str:
    """What was found, where it is written, what can come next."""
    ours = [row for row in results.rows if row.is_ours]
    wrong = [f"{row.case_name} by {row.backend}" for row in ours if row.status == RED]
    wrong += [f"digits {short_name(job['loss'])}" for job in results.digits if not job["agrees"]]
    lines = [""]
    if wrong:
        lines.append(_styled(_wrapped(f"RED, beyond the tolerance: {'; '.join(wrong)}."), _RED))
    elif ours or results.digits:
        lines.append(f"All {len(ours) + len(results.digits)} results of ours are right.")
    n, bars = at_one_size(results.rows)
    if bars:
        best = ", ".join(
            f"{label(row)} {times(row, 'eager')}x" for row in bars if row.backend.startswith(ours[0].backend)
        )
        lines.append(_wrapped(f"`{ours[0].backend}` against eager PyTorch at N = {n:,}: {best}."))
    limits = frontier(results.rows, results.environment["available_memory_gib"] * 2**30)
    if limits:
        largest = ", ".join(f"{x.backend} {rounded(x.largest_n)} ({x.bound})" for x in limits)
        lines.append(_wrapped(f"Largest N here, extrapolated: {largest}."))
    if results.left_out:
        lines.append(_wrapped(f"Not begun within the time limit (--time-limit): {'; '.join(results.left_out)}."))
    lines += ["", "Files:", *(f"  {path}" for path in files), "Next:"]
    for command, what in hints:
        lines += textwrap.wrap(f"{command}: {what}", width() - 1, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def comparison(results: Results, before: Results) -> str:
    """What was ours in both files: milliseconds before and now, how many times faster, most changed first."""
    known = {(row.case_name, row.backend): row for row in before.rows if row.is_ours and row.total_quartiles_ms}
    lines = []
    for row in results.rows:
        old = known.get((row.case_name, row.backend))
        if old is not None and old.total_quartiles_ms and row.total_quartiles_ms:
            was, now = old.total_quartiles_ms[1], row.total_quartiles_ms[1]
            lines.append(
                (was / now, f"  {row.case_name}, {row.backend}: {milliseconds(was)} -> {milliseconds(now)} ms")
            )
    if not lines:
        return "Nothing of ours was timed in both files."
    text = [f"{line}, {ratio:.2f}x" for ratio, line in sorted(lines, key=lambda x: -abs(math.log(x[0])))]
    commits = f"{before.environment.get('commit')} on {before.environment.get('device')}"
    return "\n".join([f"Against {commits}:", *text])


def at_one_size(rows: Sequence[Row]) -> tuple[int, list[Row]]:
    """The N at which most losses were compared with eager PyTorch, and what was ours there, in the first dtype."""
    compared = [row for row in rows if row.is_ours and "eager" in row.ratios]
    if not compared:
        return 0, []
    losses: dict[int, set[str]] = {}
    for row in compared:
        losses.setdefault(row.N, set()).add(row.loss)
    n = max(losses, key=lambda size: (len(losses[size]), size))
    return n, [row for row in compared if (row.N, row.dtype) == (n, compared[0].dtype)]


def label(row: Row) -> str:
    """The problem without its N, for people: "SANE, 4,096 keys"."""
    layouts = {"symmetric": ", symmetric (CLIP)", "queue": ", queue (MoCo)"}
    more = (f", {row.M:,} keys" if row.N != row.M else "") + (f", {row.dtype}" if row.dtype != "float32" else "")
    ranks = {"bayesian": ", histogram" if row.backend.endswith("histogram") else ", exact"}.get(
        short_name(row.loss), ""
    )
    return LOSSES[row.loss].title + ranks + layouts.get(row.layout, "") + more


def markdown(results: Results) -> str:
    """The site's table: a line for every problem, ours and the baselines side by side."""
    backends = list(dict.fromkeys(row.backend.partition(",")[0] for row in results.rows if row.is_ours))
    heads = ["loss", "N", "eager PyTorch", "chunked recompute", *(f"`{name}` backend" for name in reversed(backends))]
    heads.append(f"`{backends[0]}` against eager" if backends else "")
    problems: dict[str, list[Row]] = {}
    for row in results.rows:
        problems.setdefault(row.case_name, []).append(row)
    lines = [heads, ["---"] * len(heads)]
    for rows in problems.values():
        found = {row.backend: row for row in rows}
        for suffix in dict.fromkeys(row.backend.partition(",")[1:] for row in rows if row.is_ours):
            ours = ["".join((name, *suffix)) for name in backends]
            cells = [_cell(found.get(name)) for name in ("eager", "chunked", *reversed(ours))]
            best = found.get(ours[0])
            ratio = times(best, "eager") if best else ""
            lines.append([label(best or rows[0]), f"{rows[0].N:,}", *cells, f"{ratio}x" if ratio else ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    peak = "" if row.peak_extra_mib is None else f", {row.peak_extra_mib:,.0f} MiB"
    return (f"{milliseconds(row.total_quartiles_ms[1])} ms" if row.total_quartiles_ms else row.status) + peak


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width() - 1, break_long_words=False, break_on_hyphens=False)


def _styled(text: str, code: str) -> str:
    is_plain = not code or not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if is_plain else f"\x1b[{code}m{text}\x1b[m"
