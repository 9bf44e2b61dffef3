"""The picture of a results file: time and peak memory against N, the largest N in reach, every loss at one N."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .frontier import frontier, growing_series, rounded
from .report import at_one_size, label, times
from .results import Results, Row

# Ours in saturated colours, baselines in greys: the eye separates them before it reads a name.
OURS = ("#0b6fb8", "#d1495b", "#2a9d5c", "#8e5bb5")
BASELINES = ("#3d3d3d", "#8f8f8f", "#c4a35a", "#9c7a5b", "#b8b8b8")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def draw(results: Results, path: Path) -> bool:
    """Write the picture, if there is anything to draw; ImportError without matplotlib."""
    figure = picture(results)
    if figure is not None:
        figure.savefig(path, dpi=130)
    return figure is not None


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
    upper, lower = 3.8, max(3.8, 0.21 * len(at_one_size(results.rows)[1]))  # inches; a line for every bar
    ratios = {"height_ratios": (upper, lower)}
    figure, axes = plt.subplots(2, 2, figsize=(11, upper + lower), gridspec_kw=ratios, layout="constrained")
    row, facts = next(iter(series.values()))[0], results.environment
    problem = f"{label(row)}, two views, D = {row.D}"
    _draw_growth(
        axes[0, 0], series, colors, f"{problem}: time, ms", lambda row: (row.total_quartiles_ms or [None] * 2)[1]
    )
    _draw_growth(axes[0, 1], series, colors, "peak memory beyond the inputs, MiB", lambda row: row.peak_extra_mib)
    _draw_frontier(axes[1, 0], results, colors)
    _draw_speed(axes[1, 1], results.rows, colors)
    where = facts["device"] if facts["cuda"] else f"{facts['device']}, {facts['num_threads']} threads"
    figure.suptitle(f"forward + backward, torch {facts['torch']}, {where}", x=0.01, ha="left", fontsize=11)
    plt.close(figure)  # pyplot forgets it
    return figure


def _colors(rows: list[Row]) -> dict[str, str]:
    ours = list(dict.fromkeys(row.backend.partition(",")[0] for row in rows if row.is_ours))
    others = list(dict.fromkeys(row.backend for row in rows if not row.is_ours))
    colors = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
    return colors | {name: BASELINES[i % len(BASELINES)] for i, name in enumerate(others)}


def _draw_growth(
    axis, series: dict[str, list[Row]], colors: dict[str, str], title: str, value: Callable[[Row], float | None]
) -> None:
    for name, rows in series.items():
        points = [(row.N, y) for row in rows if (y := value(row))]
        if points:
            color, is_ours = colors[name.partition(",")[0]], rows[0].is_ours
            axis.plot(
                *zip(*points, strict=True), "o-" if is_ours else "s--", color=color, ms=4, lw=1.8 if is_ours else 1.3,
                label=f"fused, {name}" if is_ours else name,
            )  # fmt: skip
    sizes = sorted({row.N for rows in series.values() for row in rows})
    axis.set(xscale="log", yscale="log", title=title, xlabel="N = 2B anchors")
    axis.set_xticks(sizes, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sizes])
    axis.minorticks_off()
    axis.grid(axis="y", lw=0.4, alpha=0.5)
    axis.legend(loc="upper left", frameon=False)


def _draw_frontier(axis, results: Results, colors: dict[str, str]) -> None:
    memory = results.environment["available_memory_gib"]
    limits = frontier(results.rows, memory * 2**30)
    for i, limit in enumerate(limits):
        axis.barh(i, limit.largest_n, color=colors[limit.backend.partition(",")[0]], height=0.6)
        bound = "memory is full" if limit.bound == "memory" else "a minute is over"
        axis.annotate(f" {rounded(limit.largest_n)}: {bound}", (limit.largest_n, i), va="center")
    axis.set_yticks(range(len(limits)), [f"fused, {x.backend}" if x.is_ours else x.backend for x in limits])
    axis.set(title=f"largest N with {memory:g} GiB and a minute a step, extrapolated", xlabel="N", xticks=[])
    axis.margins(x=0.4)
    axis.tick_params(axis="y", length=0)


def _draw_speed(axis, rows: list[Row], colors: dict[str, str]) -> None:
    n, bars = at_one_size(rows)
    names = list(dict.fromkeys(label(row) for row in bars))[::-1]
    backends = list(dict.fromkeys(row.backend.partition(",")[0] for row in bars))
    height = 0.8 / max(1, len(backends))
    for row in bars:
        backend = row.backend.partition(",")[0]
        at = names.index(label(row)) + 0.4 - height * (backends.index(backend) + 0.5)
        low, middle, high = row.ratios["eager"]
        axis.barh(at, middle, color=colors[backend], height=0.9 * height)
        axis.plot([low, high], [at, at], color="black", lw=1)
        axis.annotate(
            f"{times(row, 'eager')}x", (max(high, middle), at), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize="small", bbox={"fc": "white", "ec": "none", "pad": 0.3},
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set(title=f"times faster than eager PyTorch, N = {n:,}")
    axis.margins(x=0.12, y=0.02)
    axis.tick_params(axis="y", length=0)
