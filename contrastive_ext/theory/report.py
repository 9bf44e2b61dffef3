"""`python -m contrastive_ext negatives`: what a batch size means for a data set, as a table and as a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..diagnostics.memory import estimate_memory, mebibytes
from .coupon import (
    collision_probability,
    coverage_probability,
    expected_draws,
    expected_log_collisions,
    false_negative_rate,
    num_negatives_for,
)

TARGETS = (0.5, 0.9, 0.99)  # coverages whose batch size is printed
_LARGEST_DEFAULT = 2**16
_COLUMNS = (  # two lines, so that the table fits into 80 characters
    ("batch", "negatives", "", "", "E ln", "false", "dense", "fused"),
    ("B", "2 B - 2", "coverage", "collision", "(Col+1)", "negatives", "MiB", "MiB"),
)
_LEGEND = """\
negatives        of an anchor in the two-view loss, two views of every other image; coverage counts these images and \
the anchor's own, collisions count these images
coverage         probability that the batch shows every class: below it the loss compares with a part of the classes
collision        probability that a negative has the anchor's class
E ln(Col+1)      what the loss pays for collisions, nats
false negatives  expected number among the negatives of an anchor
dense, fused     peak memory of the loss, forward + backward, float32, D = {dim}: eager PyTorch, and the backend \
{backend!r}, which `auto` takes here"""


def read_counts(path: Path) -> Tensor:
    """[C] float64 class counts of a CSV file: the last column of every line; a first line without a number is a header.

    Raises   ValueError naming the line that holds no number, or if no line does; OSError
    """
    counts: list[float] = []
    with path.open(newline="") as file:
        lines = csv.reader(file)
        try:
            for number, cells in enumerate(lines, start=1):
                if not any(cell.strip() for cell in cells):
                    continue
                try:
                    counts.append(float(cells[-1]))
                except ValueError:
                    if number > 1:
                        got = f"{cells[-1]!r:.60}"
                        raise ValueError(f"{path}, line {number}: expected a class count, got {got}.") from None
        except csv.Error as error:  # a field of more than 131,072 characters, a NUL
            raise ValueError(f"{path}, line {lines.line_num}: this is no CSV of class counts ({error}).") from error
    if not any(counts):
        raise ValueError(f"{path} holds no class counts; expected one line per class, the count in the last column.")
    return torch.tensor(counts, dtype=torch.float64)


def table(prior: Tensor, batch_sizes: Sequence[int] | None = None, dim: int = 128) -> str:
    """The report for classes of the given weights [C]; classes of weight 0 are left out and counted."""
    present = prior[prior != 0]
    rate = false_negative_rate(present)
    lines = [
        f"{len(present):,} classes, {_balance(present)}; {expected_draws(prior=present):,.1f} draws show all of them"
    ]
    if len(present) < len(prior):
        lines.append(f"{len(prior) - len(present):,} classes without samples are left out")
    suggestion = "the natural tau_plus of the debiased losses" if rate < 1 else "nothing to tell apart"
    lines.append(f"false-negative rate {rate:.4g}: {suggestion}")
    needed = [1 + num_negatives_for(target, prior=present) for target in TARGETS] if len(present) > 1 else []
    rows = [_row(b, present, rate, dim) for b in batch_sizes or _default_sizes(needed)]
    widths = [max(map(len, column)) for column in zip(*_COLUMNS, *rows, strict=True)]
    lines += ["", *("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in [*_COLUMNS, *rows])]
    reached = ", ".join(f"{target:.0%} from B = {b:,}" for target, b in zip(TARGETS, needed, strict=False))
    legend = _LEGEND.format(dim=dim, backend=estimate_memory(1, dim).backend)
    return "\n".join([*lines, "", f"coverage {reached}" if reached else "one class is always covered", "", legend])


def draw(prior: Tensor, path: Path) -> None:
    """Write the coverage curve and the collision term against the batch size; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    present = prior[prior != 0]
    last = 2 * (1 + num_negatives_for(TARGETS[-1], prior=present)) if len(present) > 1 else 64
    sizes = torch.logspace(0, math.log10(last), 120).round().long().unique()
    coverage = coverage_probability(sizes, prior=present)
    collisions = expected_log_collisions(sizes - 1, present)
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.plot(sizes, coverage, color="#0b6fb8", lw=1.8)
    axis.set(xscale="log", xlabel="batch size B", ylim=(0, 1.03))
    axis.set_ylabel("coverage: all classes in the batch", color="#0b6fb8")
    for target in TARGETS if len(present) > 1 else ():
        batch = 1 + num_negatives_for(target, prior=present)
        axis.plot([batch, batch], [0, target], color="#a8a8a8", lw=0.8, ls=":")
        axis.annotate(f"{target:.0%}: {batch:,} ", (batch, target), ha="right", va="top", fontsize="small")
    other = axis.twinx()
    other.plot(sizes, collisions, color="#d1495b", lw=1.3)
    other.set_ylabel("E ln(Col + 1), nats", color="#d1495b")
    other.set_ylim(bottom=0)
    for each in (axis, other):
        each.spines["top"].set_visible(False)
    rate = false_negative_rate(present)
    axis.set_title(f"{len(present):,} classes, false-negative rate {rate:.3g}", loc="left", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _row(batch: int, prior: Tensor, rate: float, dim: int) -> tuple[str, ...]:
    memory = estimate_memory(batch, dim)
    return (
        f"{batch:,}",
        f"{2 * batch - 2:,}",
        f"{float(coverage_probability(batch, prior=prior)):.4g}",
        f"{float(collision_probability(batch - 1, prior)):.4g}",
        f"{float(expected_log_collisions(batch - 1, prior)):.3f}",
        f"{(2 * batch - 2) * rate:,.1f}",
        mebibytes(memory.dense),
        mebibytes(memory.fused),
    )


def _default_sizes(needed: Sequence[int]) -> list[int]:
    largest = min(_LARGEST_DEFAULT, max([4096, *needed]))
    return [2**k for k in range(5, math.ceil(math.log2(largest)) + 1)]


def _balance(prior: Tensor) -> str:
    largest, smallest = float(prior.max()), float(prior.min())
    return "equally frequent" if largest == smallest else f"the largest {largest / smallest:,.4g} times the smallest"
