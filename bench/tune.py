"""Tile sizes of the Triton kernels timed on this device: what triton_kernels/configs.py should hold.

python -m bench tune                  time them, one at a time
python -m bench tune --shard i/n      run every n-th of them once, so that n processes fill Triton's cache before
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import contrastive_ext as ce
from contrastive_ext.backends import triton_launch

from . import environment, timing
from .device import Device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
REPEATS = 7
TOLERANCE = 1e-2  # of a result's length: above the rounding of 16-bit products, below any wrong tile


def tune(
    device: Device, features: Sequence[int], rows: int, dtype: str, out: Path, shard: tuple[int, int] | None = None
) -> int:
    """Print a line per tile, write all of them to tiles-<device>-<dtype>.json; 1 if there is no Triton to tune."""
    reason = triton_launch.why_missing()
    if reason is not None:
        print(reason)
        return 1
    path = out / f"tiles-{environment.slug(device)}-{dtype}.json"
    found: dict[str, Any] = {"facts": environment.facts(device), "rows": rows, "dtype": dtype, "trials": []}
    for width in features:
        z = [torch.randn(rows // 2, width, device=device.torch).to(DTYPES[dtype]).requires_grad_() for _ in "12"]
        trials = list(_trials(z))
        expected = _run(z)
        for line, config in trials if shard is None else trials[shard[0] :: shard[1]]:
            trial = {"features": width, "kernel": line.direction} | config._asdict()
            try:
                with _preferring(line, config):
                    got = _run(z)
                    if any((a - b).norm() > TOLERANCE * b.norm() for a, b in zip(got, expected, strict=True)):
                        trial["why_not"] = "changes the result"
                    elif shard is None:
                        trial |= _times(device, z)
            except Exception as error:  # a tile that does not fit: compiler, assembler, launcher raise what they like
                trial["why_not"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
            print(*trial.values(), flush=True)
            found["trials"].append(trial)
            if shard is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _trials(z: list[Tensor]) -> Iterator[tuple[Any, Any]]:
    """(line of the table, tile) for every kernel that the loss launches: the table's tile first."""
    configs = triton_launch.kernels().configs
    configs.asked.clear()
    _run(z)
    for line in sorted(configs.asked):
        yield from ((line, config) for config in (configs.default(line), *configs.alternatives(line)))


def _run(z: list[Tensor]) -> list[Tensor]:
    loss = ce.fused_infonce_loss(*z, backend="triton")
    return [loss.detach(), *torch.autograd.grad(loss, z)]


def _times(device: Device, z: list[Tensor]) -> dict[str, float]:
    """Median milliseconds of forward and backward."""
    forward, backward = [], []
    for _ in range(REPEATS):
        start = device.mark()
        loss = ce.fused_infonce_loss(*z, backend="triton")
        middle = device.mark()
        torch.autograd.grad(loss, z)
        end = device.mark()
        device.synchronize()
        forward.append(device.milliseconds(start, middle))
        backward.append(device.milliseconds(middle, end))
    return {
        "forward_ms": round(timing.quartiles(forward)[1], 4),
        "backward_ms": round(timing.quartiles(backward)[1], 4),
    }


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
