"""The results file, and what it says: means over seeds, and differences between runs of the same seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .questions import Run

Key = tuple[str, float | None]  # label and x


class Mean(NamedTuple):
    """Over seeds: mean, standard deviation, number of them."""

    value: float
    spread: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.spread:.1f}" if self.seeds > 1 else f"{self.value:.1f}"


@dataclass
class Results:
    """Facts about the machine, and a record for every run: its fields, its metrics, seconds."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Results:
        found = json.loads(path.read_text())
        return Results(found["facts"], found["runs"])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        whole = path.with_suffix(".new")  # an interrupted write leaves what was there
        whole.write_text(f'{{"facts": {json.dumps(self.facts)},\n "runs": [\n  {lines}\n]}}\n')
        whole.replace(path)

    def __contains__(self, run: Run) -> bool:
        asked = json.loads(json.dumps(asdict(run)))
        return any(asked.items() <= row.items() for row in self.rows)

    def add(self, run: Run, metrics: dict[str, float], seconds: float) -> None:
        rounded = {name: round(value, 3) for name, value in metrics.items()}
        self.rows.append(asdict(run) | rounded | {"seconds": round(seconds, 2)})

    def of(self, question: str) -> dict[Key, dict[int, dict[str, Any]]]:
        """label and x -> seed -> its run; of several temperatures that whose mean `choice` is best."""
        by_temperature: dict[Key, dict[float, dict[int, dict[str, Any]]]] = {}
        for row in self.rows:
            if row["question"] == question:
                temperatures = by_temperature.setdefault((row["label"], row["x"]), {})
                temperatures.setdefault(row["temperature"], {})[row["seed"]] = row
        return {
            key: max(found.values(), key=lambda seeds: statistics.mean(row["choice"] for row in seeds.values()))
            for key, found in by_temperature.items()
        }


def mean(seeds: dict[int, dict[str, Any]], metric: str = "score") -> Mean:
    values = [row[metric] for row in seeds.values()]
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def difference(ours: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of the score over the seeds of both, and its standard error."""
    common = sorted(ours.keys() & baseline.keys())
    found = [ours[seed]["score"] - baseline[seed]["score"] for seed in common]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("inf")
    return statistics.mean(found), error


def verdict(ours: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> str:
    """ "+3.1 ± 0.4", or the same with "no difference" where it is less than twice its standard error."""
    by, error = difference(ours, baseline)
    shown = f"{by:+.1f} ± {error:.1f}"
    return shown if abs(by) > 2 * error else f"no difference ({shown})"


def departures(new: Results, committed: Results) -> list[str]:
    """Where a new mean lies outside the spread of the committed one, beyond what so many seeds leave to chance."""
    found = []
    for question in dict.fromkeys(row["question"] for row in new.rows):
        old = committed.of(question)
        for key, seeds in new.of(question).items():
            if key in old:
                a, b = mean(seeds), mean(old[key])
                allowed = max(a.spread, b.spread, 0.5) * (1 + 2 / min(a.seeds, b.seeds) ** 0.5)
                if abs(a.value - b.value) > allowed:
                    found.append(f"{question}, {key[0]}, {key[1]}: {a} here, {b} committed")
    return found


def labels_of(found: Sequence[Key]) -> list[str]:
    return list(dict.fromkeys(label for label, _ in found))
