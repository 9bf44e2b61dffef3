"""What is run on the machine, by tests and by `make ptx`: programs that are known to be right, and faults in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

import numpy as np

from . import floats, kernels
from .errors import PtxError
from .kernels import UNFILLED, Forward
from .mutations import Mutation
from .schedules import Schedule

LN2 = float(np.float32(np.log(2)))  # times log2(e) exactly 1 in float32: exponentials are powers of two
SAMPLES = ("ring", "sm_80", "sm_90", "sm_90 TMA")
ULPS = 4  # of the largest logit and of the result, as in tests/accuracy.py


def whole_rows(rows: int, seed: int = 0) -> np.ndarray:
    """[rows, 128] whole numbers, of which most are 0: scores stay within +-8 or so, in float16."""
    dice = np.random.default_rng(seed)
    shape = rows, kernels.FEATURES
    return (dice.integers(-1, 2, shape) * (dice.random(shape) < 0.2)).astype(np.float16)


def unit_rows(rows: int, seed: int = 0) -> np.ndarray:
    """[rows, 128] of length 1, in float16."""
    z = np.random.default_rng(seed).standard_normal((rows, kernels.FEATURES))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)


def some_ids(rows: int, seed: int, padding: float = 0.0) -> np.ndarray:
    """Five classes, and padding."""
    dice = np.random.default_rng(seed)
    return np.where(dice.random(rows) < padding, UNFILLED, dice.integers(0, 5, rows))


def forwards() -> dict[str, Forward]:
    """Calls of the CUDA forward; those with whole rows and scale ln 2 are exact in every bit."""
    bf16 = floats.to_bf16(whole_rows(130, 5).astype(np.float32))
    return {
        "two views, ragged": Forward(whole_rows(130), num_images=65, scale=LN2),
        "two sets, ragged, three splits": Forward(whole_rows(70), whole_rows(333, 1), scale=LN2, splits=3),
        "stages filled again": Forward(whole_rows(128), whole_rows(5 * 128 + 3, 1), scale=LN2),
        "ids, padding, a shard of columns, two splits": Forward(
            whole_rows(140), whole_rows(300, 1), row_ids=some_ids(140, 2), col_ids=some_ids(300, 3, 0.1),
            num_images=70, positive_offset=33, scale=LN2, splits=2,
        ),
        "ids of one set": Forward(whole_rows(130), row_ids=some_ids(130, 2), num_images=65, scale=LN2),
        "padding alone": Forward(whole_rows(64), whole_rows(140, 1), col_ids=some_ids(140, 3, 0.5), scale=LN2),
        "every column a positive": Forward(whole_rows(150), num_images=1, scale=LN2),
        "bf16": Forward(bf16, bfloat16=True, num_images=65, scale=LN2),
        "scale on the device, an exponent": Forward(
            unit_rows(64), unit_rows(128, 1), scale=10.0, scale_on_device=True, beta=0.5
        ),
        "running maximum by request": Forward(unit_rows(130), unit_rows(700, 1), scale=10.0, unit=False, splits=3),
        "running maximum by temperature": Forward(unit_rows(130), num_images=65, scale=200.0),
        "running maximum and ids": Forward(
            unit_rows(70), unit_rows(140, 1), row_ids=some_ids(70, 2), col_ids=some_ids(140, 3, 0.1), unit=False,
            scale=10.0,
        ),
        "256 x 384": Forward(unit_rows(256), unit_rows(384, 1), scale=10.0, splits=2),
    }  # fmt: skip


def check_forward(call: Forward, schedule: Schedule) -> None:
    """Raises if the machine or the numbers object; shared memory begins where the program has to align it."""
    lse, count, swept = call.run(schedule, shared_base=1024 if schedule.at_once else 1040)
    expected, negatives = call.truth()
    np.testing.assert_array_equal(count, negatives)
    largest = max(1.0, np.abs(call.logits()[call.negatives()]).max(initial=0.0))
    bound = ULPS * 2**-23 * (largest + np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    np.testing.assert_allclose(lse, expected, rtol=0, atol=bound)
    if call.scale == LN2:
        assert call.is_exact(swept), "partial results are not those of whole scores"


def why_not(program: str) -> str | None:
    """Why a program cannot be had here."""
    if program == "forward":
        return None if kernels.cuda_gate.find_nvcc() else "nvcc was not found (CUDA_HOME, PATH)."
    release = tuple(map(int, version("triton").split(".")[:2]))
    if program == "ring" and release < (3, 9):
        return "the ring is written in the Gluon of Triton 3.9."
    if program == "sm_90" and release < (3, 9):
        return "Triton 3.6 leaves out the proxy fence between cp.async and WGMMA: the machine refuses its code."
    return None


@lru_cache
def runner(program: str) -> tuple[str, Callable[[str, Schedule], bool]]:
    """(text of a program that is right, a function of a text and a schedule: whether every bit of its result is)."""
    if program == "forward":
        call = Forward(whole_rows(128), whole_rows(5 * 128, 1), scale=LN2)
        text = kernels.only_entry(kernels.forward_ptx(), "OperandE0ELi128E")
        return text, lambda text, schedule: call.is_exact(call.sweep(schedule, text))
    if program == "ring":
        from . import sample_ring

        ring = sample_ring.compiled()
        return ring.asm["ptx"], lambda text, schedule: sample_ring.run(ring, text, schedule)[0]
    from . import sample_products

    kernel = sample_products.compiled(int(program[3:5]), "TMA" in program)
    return kernel.asm["ptx"], lambda text, schedule: sample_products.run(kernel, text, "fp16", schedule)[0]


def outcome(mutation: Mutation, schedule: Schedule) -> tuple[str, str]:
    """(what noticed the fault, its words): the kind of an error, "result", or "nothing"."""
    text, run = runner(mutation.program)
    edited = mutation.edit(text)
    assert edited != text, f"{mutation.fault}: nothing was changed"
    try:
        return ("nothing", "") if run(edited, schedule) else ("result", "the numbers are wrong")
    except PtxError as error:
        return error.kind, str(error)
