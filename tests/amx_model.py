"""Products of bf16 operands by the model of AMX (csrc/cpu/tile_registers.h), on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def multiply_by(name: str) -> str:
    """From the next call on; "auto", "amx", "model" or "widened". Who does now."""
    return torch.ops.contrastive_ext.use_bf16_products_cpu(name)


@contextmanager
def the_model_multiplies() -> Iterator[None]:
    assert multiply_by("model") == "model"
    try:
        yield
    finally:
        multiply_by("auto")
