"""What tests/golden holds: cases of the authors' released code, recorded in float64, and exact values of the theory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@cache
def read_json(name: str) -> dict:
    """manifest.json, which describes the arrays family by family, or coupon.json."""
    return json.loads((FOLDER / name).read_text())


@cache
def _arrays(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{family}.npz") as file:
        return dict(file)


def cases(family: str) -> list[dict]:
    """The cases of a family: their names and what the released code was called with."""
    return read_json("manifest.json")[family]["cases"]


def load(family: str, case: dict) -> dict[str, Tensor]:
    """The arrays of a case by name, on the CPU, the caller's own."""
    prefix = case["case"] + "_"
    named = ((name, x) for name, x in _arrays(family).items() if name.startswith(prefix))
    return {name.removeprefix(prefix): torch.from_numpy(x.copy()) for name, x in named}


def parameters(case: dict) -> dict:
    """The keyword arguments of our function among a case's entries."""
    return {name: case[name] for name in ("tau_plus", "alpha", "beta") if name in case}
