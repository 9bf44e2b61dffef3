"""What no kernel can be faster than, beside the products: exponentials, and memory that is read and written once."""

from __future__ import annotations

from dataclasses import replace

from .case import Case
from .device import Device
from .flops import executed_flops
from .losses import dense_of, is_ranked
from .own_losses import OwnLoss

EXPONENTIALS_PER_CYCLE = 16  # of a processor, sm_80 to sm_100
PASSES = 3  # rows read forward, read and gradients written backward


def floors(method: str, case: Case, device: Device) -> tuple[list[float] | None, float]:
    """Milliseconds for the exponentials of [forward, backward], None where no rate is known, and for the memory."""
    rows = case.n + (case.m if case.layout in ("symmetric", "queue") else 0)
    memory = PASSES * rows * case.dim * case.torch_dtype.itemsize / device.copy_bytes_per_s() * 1e3
    rate, numbers = device.exponentials_per_s(EXPONENTIALS_PER_CYCLE), exponentials(method, case, device.processors)
    return None if rate is None or numbers is None else [1e3 * number / rate for number in numbers], memory


def exponentials(method: str, case: Case, processors: int | None = None) -> tuple[float, float] | None:
    """Exponentials that forward and backward execute; None for losses that are not one sweep each way.

    One for a pair visited and exponent, of two exponents where the second is twice the first one for both.
    """
    dense = dense_of(case)
    if isinstance(dense, OwnLoss) or is_ranked(case) or case.layout not in ("two_view", "symmetric"):
        return None
    first, *others = dense.exponents
    each = len([first, *(beta for beta in others if beta != 2 * first)])
    forward, backward = executed_flops(method, replace(case, dtype="bfloat16"), processors)  # those of one product
    products = 2.0 * case.n * case.m * case.dim  # of the whole matrix of scores
    # the backward: one more product for every side's gradient; stored weights serve both
    sweeps = (backward / products - (2 if case.layout == "symmetric" else 1)) if backward else 0.0
    return each * forward / (2 * case.dim), each * max(0.5, sweeps) * case.n * case.m
