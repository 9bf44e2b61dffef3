"""Tile sizes of the Triton kernels timed on this device: what triton_kernels/configs.py should hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import contrastive_ext as ce

from . import environment
from .device import Device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def tune(device: Device, features: Sequence[int], rows: int, dtype: str, out: Path) -> int:
    """Print a line per tile, write all of them to tiles-<device>-<dtype>.json; 1 if nothing could be tuned."""
    path = out / f"tiles-{environment.slug(device)}-{dtype}.json"
    found: dict = {"facts": environment.facts(device), "rows": rows, "dtype": dtype, "trials": []}
    for width in features:
        z1, z2 = (torch.randn(rows // 2, width, device=device.torch).to(DTYPES[dtype]).requires_grad_() for _ in "12")

        def step(z1=z1, z2=z2):
            loss = ce.fused_infonce_loss(z1, z2, backend="triton")
            return [loss, *torch.autograd.grad(loss, (z1, z2))]

        try:
            trials = ce.autotune(step)
        except RuntimeError as error:
            print(error)
            return 1
        print(*trials, sep="\n", flush=True)
        found["trials"] += [asdict(trial) | {"features": width} for trial in trials]
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"results: {path}")
    return 0
