"""README's table of measurements, out of the results files: python tools/readme_table.py puts it between its marks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.report import milliseconds  # noqa: E402

MARKS = "<!-- measured -->\n", "<!-- end of measured -->"
# where, results file, our backend, dtype, then (loss, layout, N, D) of its rows
CPU, GPU = "two CPU cores, float32", "H200, bf16"
SHOWN = [
    (CPU, "cpu-amd-epyc", "cpu", "float32", [
        ("infonce", "two_view", 4096, 128), ("debiased", "two_view", 2048, 128),
        ("hard_negative", "two_view", 2048, 128), ("bayesian", "two_view", 2048, 128),
        ("infonce", "symmetric", 2048, 128),
    ]),
    (CPU, "cpu-amd-epyc-long", "cpu", "float32", [("infonce", "two_view", 16384, 128)]),
    (GPU, "nvidia-h200", "triton", "bfloat16", [
        ("infonce", "queue", 1024, 128), ("infonce", "two_view", 4096, 128), ("infonce", "two_view", 65536, 128),
        ("infonce", "two_view", 32768, 1024), ("infonce", "symmetric", 32768, 512),
    ]),
]  # fmt: skip
NAMES = {"infonce": "InfoNCE", "debiased": "debiased", "hard_negative": "hard negatives"}
NAMES["bayesian"] = "Bayesian, exact ranks"


def table() -> str:
    """Markdown."""
    lines = ["| where | loss, N x D | eager PyTorch | contrastive_ext | times faster |", "|---|---|---|---|---|"]
    for where, file, backend, dtype, problems in SHOWN:
        rows = json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())["rows"]
        for loss, layout, n, d in problems:
            problem = (f"fused_{loss}_loss", layout, n, d, dtype)
            found = [r for r in rows if (r["loss"], r["layout"], r["N"], r["D"], r["dtype"]) == problem]
            ours, eager = (next(r for r in found if r["backend"] == name) for name in (backend, "eager"))
            keys = f"{ours['M']:,} keys, " if layout == "queue" else ""
            name = {"symmetric": "CLIP", "queue": f"MoCo, {keys}".rstrip(", ")}.get(layout, NAMES[loss])
            faster = f"{ours['ratios']['eager'][1]:.2g}"
            lines.append(f"| {where} | {name}, {n:,} x {d:,} | {_cell(eager)} | {_cell(ours)} | {faster} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{milliseconds(row['total_quartiles_ms'][1])} ms, {row['peak_extra_mib']:,.0f} MiB"


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    readme.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
