"""What a tile costs, counted: a model's input, not a measurement. Instructions are those of PTX, before ptxas.

Differences of two runs that differ by whole unmasked tiles, for 128x128 pairs; instructions of a warp as if of 8 warps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

import contrastive_ext
from contrastive_ext.backends.triton import launch as triton_launch

from . import calls, kernels
from .backward import entry_of
from .checks import gradient, unit_rows
from .machine import program
from .parser import Instruction
from .report import Report
from .schedules import Schedule
from .triton_kernels import launcher

CLASSES = (
    "products", "exponentials", "floats", "integers and predicates", "moves", "shared memory", "global memory",
    "copies", "shuffles", "synchronisation", "branches",
)  # fmt: skip
BYTES = (
    "L2 bytes by TMA", "L2 bytes by cp.async", "global bytes loaded", "global bytes stored",
    "shared bytes of products", "shared wavefronts", "shared wavefronts without conflicts",
)  # fmt: skip
# what a processor of an H100 does in a clock: instructions, exponentials, flops, bytes from L2, bytes of shared memory
ISSUE, EXPONENTIALS, FLOPS, L2, SHARED = 4, 16, 4096, 30, 128
FEW, MANY = 4, 6  # column tiles of 128


def forward_counts(features: int, columns: bool = False, scale: float = 10.0) -> Counter[str]:
    """Of the CUDA forward, without a shift up to a scale of 69."""

    def run(tiles: int) -> Counter[str]:
        u, v = unit_rows(128, 0, features), unit_rows(tiles * 128, 1, features)
        report = kernels.Forward(u, v, scale=scale, columns=columns).sweep(Schedule()).report
        return report.classes(_code("row_stats_forward", kernels.entry_of(features, False, columns))) + report.sums

    return _per_pairs(run, 128)


def backward_counts(features: int) -> Counter[str]:
    """Of the CUDA backward of one set: both directions of a pair, factored."""

    def run(tiles: int) -> Counter[str]:
        u, v = unit_rows(128, 0, features), unit_rows(tiles * 128, 1, features)
        report = gradient(kernels.Forward(u, v, scale=10.0), "both").sweep(Schedule())[1]
        return report.classes(_code("row_stats_backward", entry_of(features, False, 2))) + report.sums

    return _per_pairs(run, 128)


def _code(name: str, pattern: str) -> list[Instruction]:
    return program(kernels.only_entry(kernels.ptx_of(name), pattern)).code


def triton_counts(kernel: str, features: int, rows: int) -> Counter[str]:
    """Of a sweep of the triton backend over one-way InfoNCE, sm_90, fp16; of the backward the side of the rows."""

    def run(tiles: int) -> Counter[str]:
        reports: list[tuple[str, object, Report]] = []
        call = calls.Call(None, None, 90, True)  # type: ignore[arg-type]
        calls.pretend(call._replace(processors=1), launcher(Schedule, reports, counts_banks=True))
        triton_launch.programs_at_once = lambda *_: 1  # a gradient in one piece
        torch.manual_seed(0)
        z1 = torch.randn(rows, features).half().requires_grad_()
        z2 = torch.randn(tiles * 128, features).half().requires_grad_()
        loss = contrastive_ext.fused_infonce_loss(z1, z2, layout="one_way", backend="triton")
        torch.autograd.grad(loss, (z1, z2))
        _, compiled, report = next(r for r in reports if r[0] == kernel)
        return report.classes(program(compiled.asm["ptx"]).code) + report.sums  # type: ignore[attr-defined]

    return _per_pairs(run, rows)


def _per_pairs(run: Callable[[int], Counter[str]], rows: int) -> Counter[str]:
    few, many = run(FEW), run(MANY)
    assert few["blocks"] == many["blocks"], "another grid: the difference would not be one of tiles"
    tiles = (MANY - FEW) * rows / 128
    return Counter(
        {k: round((many[k] - few[k]) / tiles / (8 if k in CLASSES else 1)) for k in (*CLASSES, *BYTES, "flops")}
    )


def clocks(counts: Counter[str]) -> dict[str, int]:
    """How long each part of a processor would be busy with 128x128 pairs if it were alone: the model."""
    from_l2 = counts["L2 bytes by TMA"] + counts["L2 bytes by cp.async"] + counts["global bytes loaded"]
    return {
        "clocks to issue": 8 * sum(counts[k] for k in CLASSES) // ISSUE,
        "clocks of exponentials": 8 * 32 * counts["exponentials"] // EXPONENTIALS,
        "clocks of tensor cores": counts["flops"] // FLOPS,
        "clocks of L2": from_l2 // L2,
        "clocks of shared memory": counts["shared bytes of products"] // SHARED + counts["shared wavefronts"],
    }


def table() -> str:
    """Markdown, a column per kernel."""
    kinds = {}
    for features in (64, 128, 256):
        kinds[f"CUDA forward, D = {features}"] = forward_counts(features)
        kinds[f"CUDA forward with columns, D = {features}"] = forward_counts(features, columns=True)
        kinds[f"CUDA backward, D = {features}"] = backward_counts(features)
    kinds["CUDA forward with columns, D = 128, running maximum"] = forward_counts(128, columns=True, scale=100.0)
    for features in (128, 256):
        kinds[f"Triton forward, D = {features}"] = triton_counts("row_stats_forward_kernel", features, 256)
        kinds[f"Triton backward, D = {features}"] = triton_counts("row_stats_backward_kernel", features, 256)
    lines = [f"| | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    columns = [{**c, **clocks(c)} for c in kinds.values()]
    names = (*CLASSES, *BYTES, *clocks(Counter()))
    lines += [f"| {name} | {' | '.join(f'{c[name]:,}' for c in columns)} |" for name in names]
    return "\n".join(lines)
