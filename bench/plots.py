"""The picture of a results file: time and peak memory against N, the out-of-memory frontier, speed against eager."""

from __future__ import annotations

from pathlib import Path

from .case import short_name
from .frontier import duration, frontier, growing_series, rounded
from .results import Results, Row

# Ours in saturated colours, baselines in greys: the eye separates them before it reads a label.
OURS = ("#0b6fb8", "#d1495b", "#2a9d5c", "#8e5bb5")
BASELINES = ("#3d3d3d", "#7a7a7a", "#a8a8a8", "#c4a35a", "#9c7a5b")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def draw(results: Results, path: Path) -> None:
    """Write the picture; ImportError without matplotlib."""
    figure = picture(results)
    if figure is not None:
        figure.savefig(path, dpi=130)


def picture(results: Results):
    """The matplotlib figure; None without a problem in two views."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = growing_series(results.rows)
    if not series:
        return None
    colors = _colors(results.rows)
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    _draw_time(axes[0, 0], series, colors)
    _draw_memory(axes[0, 1], series, colors, results.environment["available_memory_gib"])
    _draw_frontier(axes[1, 0], results, colors)
    _draw_speed(axes[1, 1], results.rows, colors)
    row = next(iter(series.values()))[0]
    facts = results.environment
    where = facts["device"] if facts["cuda"] else f"{facts['device']}, {facts['num_threads']} threads"
    figure.suptitle(
        f"{short_name(row.loss)}, two views, D = {row.D}, {row.dtype}, torch {facts['torch']}, {where}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    for _ in range(3):  # axes that make room for the names at the ends of their lines move the ends
        figure.draw_without_rendering()
    plt.close(figure)  # pyplot forgets it
    return figure


def _colors(rows: list[Row]) -> dict[str, str]:
    ours = list(dict.fromkeys(row.backend for row in rows if row.is_ours))
    others = list(dict.fromkeys(row.backend for row in rows if not row.is_ours))
    colors = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
    return colors | {name: BASELINES[i % len(BASELINES)] for i, name in enumerate(others)}


def _label(name: str, is_ours: bool) -> str:
    return f"fused, {name}" if is_ours else name


def _draw_time(axis, series: dict[str, list[Row]], colors: dict[str, str]) -> None:
    ends = []
    for name, rows in series.items():
        timed = [row for row in rows if row.total_quartiles_ms]
        if not timed:
            continue
        n = [row.N for row in timed]
        low, middle, high = zip(*(row.total_quartiles_ms for row in timed), strict=True)
        axis.plot(n, middle, "o-", color=colors[name], ms=4, lw=1.8 if timed[0].is_ours else 1.3)
        axis.fill_between(n, low, high, color=colors[name], alpha=0.15, lw=0)
        ends.append((n[-1], middle[-1], name, timed[0].is_ours))
    _finish_growth(axis, series, "time, ms (band: quartiles)", ends, colors)


def _draw_memory(axis, series: dict[str, list[Row]], colors: dict[str, str], available_gib: float) -> None:
    ends = []
    for name, rows in series.items():
        measured = [row for row in rows if row.peak_extra_mib]
        if not measured:
            continue
        n, peak = [row.N for row in measured], [row.peak_extra_mib for row in measured]
        axis.plot(n, peak, "o-", color=colors[name], ms=4, lw=1.8 if measured[0].is_ours else 1.3)
        ends.append((n[-1], peak[-1], name, measured[0].is_ours))
    axis.axhline(available_gib * 1024, color="#b00020", lw=1, ls=":")
    axis.annotate(
        f"{available_gib:g} GiB available", (0.01, available_gib * 1024), xycoords=("axes fraction", "data"),
        textcoords="offset points", xytext=(0, -11), color="#b00020",
    )  # fmt: skip
    _finish_growth(axis, series, "peak memory beyond the inputs, MiB", ends, colors)


def _finish_growth(axis, series: dict[str, list[Row]], title: str, ends: list[tuple], colors: dict[str, str]) -> None:
    sizes = sorted({row.N for rows in series.values() for row in rows})
    axis.set(xscale="log", yscale="log", title=title, xlabel="N = 2B anchors")
    axis.set_xticks(sizes, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sizes])
    axis.minorticks_off()
    axis.set_xlim(sizes[0] * 0.85, sizes[-1] * 2.6)  # room for the names at the ends
    axis.grid(axis="y", lw=0.4, alpha=0.5)
    axis.figure.canvas.draw()
    taken: list[float] = []
    for n, value, name, is_ours in sorted(ends, key=lambda end: end[1]):
        height = axis.transData.transform((n, value))[1]
        label = max([height, *(t + 15 for t in taken)]) if taken else height
        taken.append(label)
        rise = (label - height) * 72 / axis.figure.dpi - 3
        axis.annotate(
            _label(name, is_ours), (n, value), xytext=(7, rise), textcoords="offset points",
            color=colors[name], fontweight="bold",
        )  # fmt: skip


def _draw_frontier(axis, results: Results, colors: dict[str, str]) -> None:
    memory = results.environment["available_memory_gib"]
    limits = frontier(results.rows, memory * 2**30)
    names = [_label(limit.backend, limit.is_ours) for limit in limits]
    sizes = [limit.largest_n for limit in limits]
    axis.barh(names, sizes, color=[colors[limit.backend] for limit in limits], height=0.6)
    for i, limit in enumerate(limits):
        step = f", {duration(limit.hours)} a step" if limit.hours else ""
        axis.annotate(f" {rounded(limit.largest_n)}{step}", (limit.largest_n, i), va="center")
    axis.set(xscale="log", title=f"largest N in {memory:g} GiB, extrapolated from the measured peaks", xlabel="N")
    if limits:
        axis.set_xlim(limits[0].largest_n / 4, limits[-1].largest_n * 20)
    axis.tick_params(axis="y", length=0)


def _draw_speed(axis, rows: list[Row], colors: dict[str, str]) -> None:
    compared = [row for row in rows if row.is_ours and row.layout == "two_view" and "eager" in row.ratios]
    largest: dict[str, int] = {}
    for row in compared:
        largest[row.loss] = max(largest.get(row.loss, 0), row.N)
    bars = [row for row in compared if largest[row.loss] == row.N and row.dtype == compared[0].dtype][::-1]
    for i, row in enumerate(bars):
        low, middle, high = row.ratios["eager"]
        axis.barh(i, middle, color=colors[row.backend], height=0.6)
        axis.plot([low, high], [i, i], color="black", lw=1)
        axis.annotate(f" {middle:.2g}x", (high, i), va="center")
    names = [f"{short_name(row.loss)}, {row.backend}\nN = {row.N:,}" for row in bars]
    axis.set_yticks(range(len(bars)), names, fontsize="small")
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set(title="times faster than eager PyTorch (line: quartiles)")
    axis.margins(x=0.12)
    axis.tick_params(axis="y", length=0)
