"""What is run on the machine, by tests and by `make ptx`: programs that are known to be right, and faults in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from . import kernels
from .errors import PtxError
from .mutations import Mutation
from .schedules import Schedule

LN2 = float(np.float32(np.log(2)))  # times log2(e) exactly 1 in float32: exponentials are powers of two


def whole_rows(rows: int, seed: int = 0) -> np.ndarray:
    """[rows, 128] whole numbers, of which most are 0: scores stay within +-8 or so, in float16."""
    dice = np.random.default_rng(seed)
    return (dice.integers(-1, 2, (rows, kernels.FEATURES)) * (dice.random((rows, kernels.FEATURES)) < 0.2)).astype(
        np.float16
    )


@lru_cache
def runner(program: str) -> tuple[str, Callable[[str, Schedule], bool]]:
    """(text of a program that is right, a function of a text and a schedule: whether every bit of its result is)."""
    if program == "forward":
        call = kernels.Forward(whole_rows(128), whole_rows(6 * 128, 1), scale=LN2)
        text = kernels.only_entry(kernels.forward_ptx(), "OperandE0EEE")
        return text, lambda text, schedule: call.is_exact(call.sweep(schedule, text))
    if program == "ring":
        from . import sample_ring

        ring = sample_ring.compiled()
        return ring.asm["ptx"], lambda text, schedule: sample_ring.run(ring, text, schedule)[0]
    from . import sample_products

    kernel = sample_products.compiled(int(program[3:5]), "TMA" in program)
    return kernel.asm["ptx"], lambda text, schedule: sample_products.run(kernel, text, "fp16", schedule)[0]


def outcome(mutation: Mutation, schedule: Schedule) -> tuple[str, str]:
    """(what noticed the fault, in how many words): the kind of an error, "result", or "nothing"."""
    text, run = runner(mutation.program)
    edited = mutation.edit(text)
    assert edited != text, f"{mutation.fault}: nothing was changed"
    try:
        return ("nothing", "") if run(edited, schedule) else ("result", "the numbers are wrong")
    except PtxError as error:
        return error.kind, str(error)
