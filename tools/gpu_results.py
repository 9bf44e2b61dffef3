"""Takes over what `make gpu` brought back: results files, the verified table, the site's table of the GPU.

    python tools/gpu_results.py FOLDER [--root ROOT]
    python tools/gpu_results.py --measured      the steps of gpu.sh whose committed results are of the code as it is

Writes bench/results/<device>.json with -proof.jsonl, -kernels.json and -tiles.json beside it, the lines of
contrastive_ext/backends/verified.py for what the proof shows, and docs/benchmarks.md between its two marks. Refuses a
rehearsal and results of a tree that is no commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- gpu table -->", "<!-- end of gpu table -->"
TORCH_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "tf32": "float32",
    "float64": "float64",
}
BY_NAME = ("fp16x3",)  # numerics.SPLIT_PRODUCTS, entries of their own
COMPLETE = ("triton",)  # backends that make everything their why_not lets through: dispatch.VERIFIED takes no others
MEASURED_CODE = ("triton_kernels", "contrastive_ext", "csrc", "bench", ":!bench/results", ":!*/verified.py")
FORWARD_KERNELS = ("prologue_kernel", "row_stats_forward", "row_losses", "add_parts", "merge", "FillFunc")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if the folder is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, nargs="?")
    what.add_argument("--measured", action="store_true", help="name steps that have nothing new to show")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to write to")
    options = parser.parse_args(arguments)
    if options.measured:
        print(*measured(options.root), sep="\n")
        return 0
    speed = json.loads((options.folder / "speed.json").read_text())
    proofs = [json.loads(line) for line in (options.folder / "proof.jsonl").read_text().splitlines()]
    reason = why_refused(speed, proofs)
    if reason is not None:
        print(f"refused: {reason}")
        return 1
    results, slug = options.root / "bench" / "results", re.sub(r"[^a-z0-9]+", "-", speed["device"].lower()).strip("-")
    (results / f"{slug}.json").write_text(json.dumps(speed, indent=1) + "\n")
    (results / f"{slug}-proof.jsonl").write_text("".join(json.dumps(line) + "\n" for line in proofs))
    kernels = json.loads((options.folder / "kernels.json").read_text())
    (results / f"{slug}-kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
    for tiles in options.folder.glob("tiles-*.json"):
        (results / f"{slug}-tiles.json").write_text(tiles.read_text())
    verified = options.root / "contrastive_ext" / "backends" / "verified.py"
    verified.write_text(
        with_entries(verified.read_text(), entries(proofs, speed["architecture"], f"{slug}-proof.jsonl"))
    )
    page = options.root / "docs" / "benchmarks.md"
    before, _, after = (page.read_text().partition(MARKS[0])[0], *page.read_text().partition(MARKS[1])[1:])
    page.write_text(f"{before}{MARKS[0]}\n{table(speed, kernels)}\n{MARKS[1]}{after}")
    print(f"{len(proofs)} proofs, {len(speed['rows'])} rows of {speed['device']} taken over")
    return 0


def measured(root: Path) -> list[str]:
    """Steps whose results are committed, for a GPU, of a commit since which no measured code has changed."""
    steps = []
    for path in sorted((root / "bench" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        commit = content.get("commit") if isinstance(content, dict) and content.get("cuda") else None
        if not commit or not _unchanged(root, commit):
            continue
        beside = {"proof": f"{path.stem}-proof.jsonl", "tiles": f"{path.stem}-tiles.json"}
        steps += ["speed", *(step for step, name in beside.items() if (path.parent / name).is_file())]
    return steps


def _unchanged(root: Path, commit: str) -> bool:
    """Whether git knows the commit, and that MEASURED_CODE is what it was there."""
    command = ["git", "diff", "--quiet", commit, "--", *MEASURED_CODE]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def why_refused(speed: dict[str, Any], proofs: list[dict[str, Any]]) -> str | None:
    """Why these are no results to keep, or None."""
    if not speed.get("driver") or not speed.get("cuda"):
        return f"{speed['device']} is no GPU: a rehearsal proves nothing"
    if not speed.get("commit") or speed["commit"].endswith("-dirty"):
        return f"measured at {speed.get('commit')}, which is no commit"
    if not proofs:
        return "nothing was proven"
    return None


def entries(proofs: list[dict[str, Any]], architecture: str, file: str) -> dict[tuple[str, str, str], str]:
    """(backend, architecture, dtype as the module writes it) -> file, where every case of the dtype is proven."""
    proven: dict[tuple[str, str, str], bool] = {}
    for line in proofs:
        backend = line["backend"].split(",")[0]
        if backend in COMPLETE:
            name = line["dtype"]
            key = (backend, architecture, f'"{name}"' if name in BY_NAME else f"torch.{TORCH_DTYPES[name]}")
            proven[key] = proven.get(key, True) and line["proven"]
    return {key: file for key, is_proven in sorted(proven.items()) if is_proven}


def with_entries(source: str, found: dict[tuple[str, str, str], str]) -> str:
    """The module with the lines of `found` in place of those of the same keys."""
    kept = re.findall(r'^    \("(\w+)", "(\w+)", (torch\.\w+|"\w+")\): "(.+)",$', source, re.MULTILINE)
    lines = {(backend, architecture, dtype): file for backend, architecture, dtype, file in kept} | found
    body = "".join(f'    ("{b}", "{a}", {d}): "{file}",\n' for (b, a, d), file in sorted(lines.items()))
    return re.sub(r"(= \{\n).*(\}\n)", lambda m: m.group(1) + body + m.group(2), source, flags=re.DOTALL)


def table(speed: dict[str, Any], kernels: dict[str, Any]) -> str:
    """Markdown: time on the GPU by kernel, a whole step against eager PyTorch, memory."""
    lines = [
        f"{speed['device']}, torch {speed['torch']}, Triton {speed['triton']}, CUDA {speed['cuda']}. Kernels:",
        "time on the GPU, forward + backward, in a short profile. Step: wall time with the host's share, nearly all of",
        "it for small batches, which is gone in a CUDA graph. MiB: peak beyond the inputs, gradients included.",
        "",
        "| loss, layout, shape, dtype | kernels ms | step ms | eager step ms | MiB | eager MiB |",
        "|---|---|---|---|---|---|",
    ]
    eager = {name_of(row): row for row in speed["rows"] if row["backend"] == "eager"}
    for row in speed["rows"]:
        if row["backend"] != "triton" or row["forward_ms"] is None:
            continue
        name, base = name_of(row), eager.get(name_of(row), {})
        times = kernels[name]["triton"]
        forward = sum(us for kernel, (_, us) in times.items() if any(part in kernel for part in FORWARD_KERNELS)) / 1e3
        backward = sum(us for _, us in times.values()) / 1e3 - forward
        has_step = base.get("forward_ms") is not None
        step = f"{base['forward_ms'] + base['backward_ms']:.2f}" if has_step else base.get("status", "-")
        graph = f" (graph {row['graph_ms']:.3f})" if row.get("graph_ms") else ""
        lines.append(
            f"| {name} | {forward:.3f} + {backward:.3f} "
            f"| {row['forward_ms'] + row['backward_ms']:.2f}{graph} | {step} | {row['peak_extra_mib']:.0f} "
            f"| {base.get('peak_extra_mib') or 0:.0f} |"
        )
    return "\n".join(lines)


def name_of(row: dict[str, Any]) -> str:
    """The name of the row's case, as bench.cases.Case has it."""
    shape = f"{row['N']}x{row['D']}" if row["N"] == row["M"] else f"{row['N']}x{row['M']}x{row['D']}"
    loss = row["loss"].removeprefix("fused_").removesuffix("_loss")
    return f"{loss} {row['layout']} {shape} {row['dtype']} t={row['temperature']:g}"


if __name__ == "__main__":
    sys.exit(main())
