"""Tile sizes of the Triton kernels timed on this device: what triton_kernels/configs.py should hold.

python -m bench tune                  time them, one at a time
python -m bench tune --shard i/n      run every n-th of them once, so that n processes fill Triton's cache before
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import contrastive_ext as ce
from contrastive_ext.backends.triton import launch as triton_launch

from . import environment, timing
from .device import Device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
REPEATS = 9
# "rows x columns x features of a chunk, warps, stages" on Hopper in 16 bits; True: features come in chunks
WORTH_TIMING = {
    ("forward", False): [
        *(f"128x64 4 {stages}" for stages in (2, 3, 4)),
        *(f"256x64 {warps} {stages}" for warps in (4, 8) for stages in (2, 3)),
        "128x128 8 2", "128x128 8 3", "256x128 8 3", "128x128 4 3", "64x64 4 3", "128x32 4 4",
    ],
    ("backward", False): [
        *(f"128x32 4 {stages}" for stages in (2, 3, 4)), *(f"128x64 4 {stages}" for stages in (2, 3, 4)), "128x64 8 3",
        "128x128 8 2", "128x128 8 3", "64x64 4 2", "64x64 4 3", "64x32 4 3", "256x64 8 3", "128x64 8 2", "128x32 8 3",
    ],
    ("forward", True): [
        *(f"{tile}x64 8 {stages}" for tile in ("128x128", "256x128") for stages in (3, 4)),
        "128x128x64 4 3", "128x128x64 4 4", "256x64x64 4 4", "256x64x64 8 4", "128x128x128 8 2", "128x64x64 4 4",
    ],
    ("backward", True): [
        *(f"128x128x64 8 {stages}" for stages in (3, 4, 5)), "128x128x64 4 3", "128x128x64 4 4", "128x64x64 8 4",
        "128x64x64 4 4", "256x64x64 8 4", "64x128x64 4 4", "128x128x128 8 2",
    ],
}  # fmt: skip
TOLERANCE = 1e-2  # of a result's length: above the rounding of 16-bit products, below any wrong tile


def tune(
    device: Device, features: Sequence[int], rows: int, dtype: str, out: Path,
    shard: tuple[int, int] | None = None, most: int | None = None,
) -> int:  # fmt: skip
    """Print a line per tile, write all of them to tiles-<device>-<dtype>.json; 1 if there is no Triton to tune.

    most  other tiles of a kernel at most
    """
    reason = triton_launch.why_missing()
    if reason is not None:
        print(reason)
        return 1
    path = out / f"tiles-{environment.slug(device)}-{dtype}.json"
    found: dict[str, Any] = {"facts": environment.facts(device), "rows": rows, "dtype": dtype, "trials": []}
    for width in features:
        z = [torch.randn(rows // 2, width, device=device.torch).to(DTYPES[dtype]).requires_grad_() for _ in "12"]
        trials = list(_trials(z, most))
        expected = _run(z)
        for line, config in trials if shard is None else trials[shard[0] :: shard[1]]:
            trial = {"features": width, "line": line} | config._asdict()
            try:
                with _preferring(line, config):
                    got = _run(z)
                    if any((a - b).norm() > TOLERANCE * b.norm() for a, b in zip(got, expected, strict=True)):
                        trial["why_not"] = "changes the result"
                    elif shard is None:
                        trial |= _times(device, z)
            except Exception as error:  # a tile that does not fit: compiler, assembler, launcher raise what they like
                trial["why_not"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
            print(width, line.direction, *list(trial.values())[2:], flush=True)
            found["trials"].append(trial)
            if shard is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _trials(z: list[Tensor], most: int | None) -> Iterator[tuple[Any, Any]]:
    """(line of the table, tile) for every kernel that the loss launches: the table's tile first."""
    configs = triton_launch.kernels().configs
    configs.asked.clear()
    _run(z)
    for line in sorted(configs.asked):
        table = configs.default(line)
        others = configs.alternatives(line)
        if line.products == "16-bit" and line.architecture >= configs.DESCRIPTORS_FROM:
            others = [configs.tile(*written.split()) for written in WORTH_TIMING[line.direction, table.block_d > 0]]
        yield line, table
        yield from ((line, config) for config in [c for c in others if c != table][:most])


def _run(z: list[Tensor]) -> list[Tensor]:
    loss = ce.fused_infonce_loss(*z, backend="triton")
    return [loss.detach(), *torch.autograd.grad(loss, z)]


def _times(device: Device, z: list[Tensor]) -> dict[str, float]:
    """Milliseconds of forward and backward, on a GPU those of a graph's replays: the host's share is no tile's."""
    forward = _milliseconds(device, lambda: ce.fused_infonce_loss(*z, backend="triton"))
    both = _milliseconds(device, lambda: _run(z))
    return {"forward_ms": round(forward, 4), "backward_ms": round(both - forward, 4)}


def _milliseconds(device: Device, call: Callable[[], Any]) -> float:
    call()
    if device.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    call()
    marks = [device.mark()]
    for _ in range(REPEATS):
        call()
        marks.append(device.mark())
    device.synchronize()
    return timing.quartiles([device.milliseconds(*pair) for pair in itertools.pairwise(marks)])[1]


def prefer(path: Path) -> None:
    """Take the fastest tiles of a file that `tune` wrote, for this process."""
    configs, best = triton_launch.kernels().configs, {}
    for trial in json.loads(path.read_text())["trials"]:
        line = configs.Line(*trial["line"])
        milliseconds = trial.get(f"{line.direction}_ms", float("inf"))
        if milliseconds < best.get(line, float("inf")):
            best[line] = milliseconds
            configs.preferred[line] = configs.Config(**{name: trial[name] for name in configs.Config._fields})


@contextmanager
def _preferring(line, config) -> Iterator[None]:
    preferred = triton_launch.kernels().configs.preferred
    before = preferred.get(line)
    preferred[line] = config
    try:
        yield
    finally:
        del preferred[line]
        if before is not None:
            preferred[line] = before
