"""An installed package computes every loss, forward and backward: python tools/smoke.py --backend cpu

Compares with the dense reference in float64 and float32, so that it needs nothing but the installed package and torch.
Run it where the sources' `contrastive_ext` folder is not importable by accident: it says which one it found.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import contrastive_ext as ce

Z = ("z1", "z2")


def calls(z1: Tensor, z2: Tensor, queue: Tensor, labels: Tensor) -> dict[str, Callable[[str], Tensor]]:
    """Name -> the loss on a backend."""
    both = torch.stack([z1, z2])
    perm, theta = torch.arange(len(z1)).flip(0), torch.linspace(0, 1, len(z1))
    return {
        "infonce": lambda b: ce.fused_infonce_loss(z1, z2, 0.2, backend=b),
        "clip": lambda b: ce.fused_infonce_loss(z1, z2, 0.2, layout="symmetric", backend=b),
        "moco": lambda b: ce.fused_infonce_loss(z1, z2.detach(), 0.2, layout="one_way", queue=queue, backend=b),
        "ids": lambda b: ce.fused_infonce_loss(z1, z2, 0.2, ids=labels, backend=b),
        "decoupled": lambda b: ce.fused_decoupled_loss(z1, z2, 0.2, backend=b),
        "debiased": lambda b: ce.fused_debiased_loss(z1, z2, 0.5, 0.05, backend=b),
        "hard negatives": lambda b: ce.fused_hard_negative_loss(z1, z2, 0.5, 0.05, 1.0, backend=b),
        "bayesian": lambda b: ce.fused_bayesian_loss(z1, z2, 0.5, backend=b),
        "histogram": lambda b: ce.fused_bayesian_loss(z1, z2, 0.5, ranks="histogram", bins=64, backend=b),
        "fnc eliminate": lambda b: ce.fused_false_negative_loss(both, 0.2, mode="eliminate", top_k=3, backend=b),
        "fnc attract": lambda b: ce.fused_false_negative_loss(both, 0.2, mode="attract", top_k=3, backend=b),
        "supcon": lambda b: ce.fused_supcon_loss(both, labels, 0.2, backend=b),
        "supcon in": lambda b: ce.fused_supcon_loss(both, labels, 0.2, "in", backend=b),
        "labelled infonce": lambda b: ce.fused_labelled_infonce_loss(both, labels, 0.2, backend=b),
        "sigmoid": lambda b: ce.fused_sigmoid_loss(z1, z2, 5.0, -3.0, backend=b),
        "sigmoid, ids": lambda b: ce.fused_sigmoid_loss(z1, z2, 5.0, -3.0, ids=labels, backend=b),
        "sane": lambda b: ce.fused_self_labeling_loss(z1, z2.detach(), queue, z2, perm, theta, 0.2, backend=b),
        "soft targets": lambda b: ce.fused_soft_target_loss(
            z1, queue, z2.detach(), 0.2, teacher_temperature=0.1, backend=b
        ),
    }


def worst(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Name -> largest relative difference of loss and gradients to the reference."""
    torch.manual_seed(0)
    found = {}
    common = torch.randn(37, 24, dtype=dtype)  # odd sizes: tails of tiles
    z1, z2 = ((common + 0.5 * torch.randn_like(common)).requires_grad_() for _ in Z)
    queue = torch.nn.functional.normalize(torch.randn(19, 24, dtype=dtype), dim=1)
    for name, call in calls(z1, z2, queue, torch.arange(37) // 3).items():
        results = []
        for b in (backend, "reference"):
            loss = call(b)
            gradients = torch.autograd.grad(loss, (z1, z2), allow_unused=True)
            results.append([loss.detach(), *(g for g in gradients if g is not None)])
        pairs = zip(*results, strict=True)
        found[name] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    options = parser.parse_args(arguments)
    where = Path(ce.__file__).parent
    print(f"contrastive_ext {ce.__version__} of {where}, torch {torch.__version__}, Python {platform.python_version()}")
    if options.backend not in ce.available_backends():
        print(ce.explain(torch.ones(2, 3)))
        return 1
    bad = 0
    # 100 roundings of the largest terms, far above what these sizes need and far below any mistake
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        for name, difference in worst(options.backend, dtype).items():
            wrong = not difference <= tolerance
            bad += wrong
            if wrong:
                print(f"{name}, {dtype}: {difference:.1e} from the reference, {tolerance:.0e} is allowed")
    print(f"{options.backend}: " + (f"{bad} wrong" if bad else "every loss and gradient as the reference has it"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
