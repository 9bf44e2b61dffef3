"""What is run on the machine, by tests and by `make ptx`: programs that are known to be right, and faults in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

import numpy as np

from . import backward, floats, kernels
from .backward import Backward
from .errors import PtxError
from .kernels import UNFILLED, Forward
from .mutations import Mutation
from .schedules import Schedule

LN2 = float(np.float32(np.log(2)))  # times log2(e) exactly 1 in float32: exponentials are powers of two
SAMPLES = ("ring", "sm_80", "sm_90", "sm_90 TMA")
ULPS = 4  # of the largest logit and of the result, as in tests/accuracy.py


def whole_rows(rows: int, seed: int = 0, features: int = 128) -> np.ndarray:
    """[rows, features] whole numbers, of which most are 0: scores stay within +-8 or so, in float16."""
    dice = np.random.default_rng(seed)
    shape = rows, features
    return (dice.integers(-1, 2, shape) * (dice.random(shape) < 0.2 * (128 / features) ** 0.5)).astype(np.float16)


def unit_rows(rows: int, seed: int = 0, features: int = 128) -> np.ndarray:
    """[rows, features] of length 1, in float16."""
    z = np.random.default_rng(seed).standard_normal((rows, features))
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
        **{f"{features} features, {name}": call for features in (64, 256) for name, call in _other_sizes(features)},
        **{f"columns, {name}": call._replace(columns=True) for name, call in _with_columns()},
    }  # fmt: skip


def _with_columns() -> list[tuple[str, Forward]]:
    """Calls of the CUDA forward that also makes the statistics of the columns."""
    ids = Forward(
        whole_rows(140), whole_rows(300, 1), row_ids=some_ids(140, 2, 0.1), col_ids=some_ids(300, 3, 0.1),
        num_images=70, positive_offset=33, scale=LN2, splits=2,
    )  # fmt: skip
    random = Forward(unit_rows(256), unit_rows(384, 1), num_images=256, scale=14.0)
    bf16 = Forward(in_bf16(whole_rows(128, 5)), in_bf16(whole_rows(260, 6)), bfloat16=True, num_images=128, scale=LN2)
    sizes = {k: (whole_rows(128, 5, k), whole_rows(5 * 128 + 3, 6, k)) for k in (64, 256)}
    units = {k: (unit_rows(130, 5, k), unit_rows(260, 6, k)) for k in (64, 256)}
    return [
        ("whole tiles", Forward(whole_rows(128), whole_rows(5 * 128, 1), scale=LN2)),
        ("positives", Forward(whole_rows(256), whole_rows(256, 1), num_images=256, scale=LN2)),
        ("ragged, two splits in each of two windows",
         Forward(whole_rows(130), whole_rows(5 * 128 - 3, 1), num_images=130, scale=LN2, splits=2, windows=2)),
        ("rows for one consumer", Forward(whole_rows(40), whole_rows(200, 1), scale=LN2)),
        ("ids and padding of both sides", ids),
        ("padding of rows alone",
         Forward(whole_rows(128), whole_rows(140, 1), row_ids=some_ids(128, 3, 0.5), scale=LN2)),
        ("every row a positive", Forward(whole_rows(150), whole_rows(150, 1), num_images=1, scale=LN2)),
        ("bf16", bf16),
        ("random", random._replace(splits=2)),
        ("random, scale on the device, an exponent", random._replace(scale_on_device=True, beta=0.5, splits=3)),
        ("running maximum by temperature", random._replace(scale=100.0, splits=3, windows=1)),
        ("running maximum by request, windows", random._replace(unit=False, windows=3)),
        ("running maximum, a low temperature", random._replace(scale=1000.0)),
        ("running maximum, ids and padding", ids._replace(
            u=unit_rows(140), v=unit_rows(300, 1), scale=30.0, unit=False, splits=3)),
        ("running maximum, every row a positive", Forward(
            unit_rows(150), unit_rows(150, 1), num_images=1, scale=LN2 / 2, unit=False)),
        *((f"{k} features, whole", Forward(u, v, num_images=128, scale=LN2)) for k, (u, v) in sizes.items()),
        *((f"{k} features, running maximum", Forward(
            u, v, row_ids=some_ids(130, 2, 0.1), num_images=130, scale=100.0, splits=2
        )) for k, (u, v) in units.items()),
    ]  # fmt: skip


def _other_sizes(features: int) -> list[tuple[str, Forward]]:
    """Calls of another number of features than 128; in bf16 and of one set with ids where rows are whole."""
    whole, bf16 = whole_rows(130, 5, features), in_bf16(whole_rows(130, 5, features))
    u, v = unit_rows(70, 0, features), unit_rows(333, 1, features)
    return [
        ("two views, ragged", Forward(whole, num_images=65, scale=LN2)),
        ("bf16, ids", Forward(bf16, bfloat16=True, num_images=65, row_ids=some_ids(130, 2, 0.1), scale=LN2)),
        ("stages filled again", Forward(whole[:128], whole_rows(643, 1, features), scale=LN2)),
        ("random", Forward(u, v, num_images=70, positive_offset=100, scale=14.0)),
        ("random, at a low temperature", Forward(u, num_images=35, scale=120.0)),
    ]


def check_forward(call: Forward, schedule: Schedule) -> None:
    """Raises if the machine or the numbers object; shared memory begins where the program has to align it."""
    results, swept = call.run(schedule, shared_base=1024 if schedule.at_once else 1040)
    for reverse in (False, True) if call.columns else (False,):
        lse, count = results[2:] if reverse else results[:2]
        expected, negatives = call.truth(reverse)
        np.testing.assert_array_equal(count, negatives)
        largest = max(1.0, np.abs(call.logits(reverse)[call.negatives(reverse)]).max(initial=0.0))
        bound = ULPS * 2**-23 * (largest + np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        np.testing.assert_allclose(lse, expected, rtol=0, atol=bound)
    if call.scale == LN2:
        assert call.is_exact(swept), "partial results are not those of whole scores"


def in_bf16(rows: np.ndarray) -> np.ndarray:
    return floats.to_bf16(rows.astype(np.float32))


def whole_gradient(call: Forward, terms: str, by_columns: bool = False, seed: int = 9) -> Backward:
    """Coefficients +-1 and +-2, lse 8 and 9 scales (bf16: 8): every weight and every sum is exact."""
    dice = np.random.default_rng(seed)

    def term(anchors: int):
        grad = dice.choice([-2, -1, 1, 2], anchors).astype(np.float32)
        return grad, np.float32(call.scale) * dice.integers(8, 9 if call.bfloat16 else 10, anchors).astype(np.float32)

    return _with_terms(call, terms, by_columns, term(call.shape[0]), term(call.shape[1]))


def gradient(call: Forward, terms: str, by_columns: bool = False, size: float = 1e-3, seed: int = 9) -> Backward:
    """Coefficients about `size` and the lse of the call: weights as a loss has them."""
    dice = np.random.default_rng(seed)
    sides = [(size * dice.standard_normal(k)).astype(np.float32) for k in call.shape]
    logits = call.operands()[0] @ call.operands()[1].T * call.beta * call.scale
    lses = []
    for reverse in (False, True):
        x = np.where(call.negatives(reverse), logits, -np.inf)
        largest = np.maximum(x.max(int(not reverse), keepdims=True), -1e30)
        with np.errstate(divide="ignore"):
            lses.append((largest + np.log(np.exp(x - largest).sum(int(not reverse), keepdims=True))).ravel())
    row, column = zip(sides, (lse.astype(np.float32) for lse in lses), strict=True)
    return _with_terms(call, terms, by_columns, row, column)


def _with_terms(call: Forward, terms: str, by_columns: bool, row, column) -> Backward:
    """`terms`: rows, columns, both; one set has both, and they are the same."""
    column = row if call.v is None else column
    rows = row if terms in ("rows", "both") else (None, None)
    columns = column if terms in ("columns", "both") else (None, None)
    return Backward(call, *rows, *columns, by_columns)


def backwards() -> dict[str, Backward]:
    """Sweeps of the CUDA backward; those with whole rows are exact in every bit."""
    two = Forward(whole_rows(70), whole_rows(333, 1), scale=LN2)
    shard = Forward(
        whole_rows(140), whole_rows(300, 1), row_ids=some_ids(140, 2, 0.1), col_ids=some_ids(300, 3, 0.1),
        num_images=70, positive_offset=33, scale=LN2, splits=2,
    )  # fmt: skip
    views = Forward(unit_rows(130), num_images=65, scale=10.0)
    ids = Forward(whole_rows(130), row_ids=some_ids(130, 2, 0.2), num_images=65, scale=LN2)
    random = Forward(unit_rows(200), unit_rows(390, 1), num_images=200, positive_offset=90, scale=14.0, splits=2)
    bf16 = Forward(in_bf16(whole_rows(130, 5)), bfloat16=True, num_images=65, scale=LN2)
    random_bf16 = Forward(in_bf16(unit_rows(130)), bfloat16=True, num_images=65, scale=10.0)
    return {
        "two views, ragged": whole_gradient(Forward(whole_rows(130), num_images=65, scale=LN2), "both"),
        "two views, ragged, not factored": whole_gradient(
            Forward(whole_rows(130), num_images=65, scale=LN2, unit=False), "both"
        ),
        "two sets by rows, three splits": whole_gradient(two._replace(splits=3), "rows"),
        "two sets by columns": whole_gradient(two, "rows", by_columns=True),
        "two sets, columns as anchors, by rows": whole_gradient(two, "columns"),
        "two sets, both as anchors, by columns": whole_gradient(two, "both", by_columns=True),
        "stages filled again": whole_gradient(Forward(whole_rows(128), whole_rows(643, 1), scale=LN2), "both"),
        "ids and padding of one set": whole_gradient(ids, "both"),
        "ids and padding of one set, not factored": whole_gradient(ids._replace(unit=False), "both"),
        "ids, a shard of columns, by rows": whole_gradient(shard, "both"),
        "ids, a shard of columns, by columns": whole_gradient(shard, "rows", by_columns=True),
        "every column a positive": gradient(Forward(unit_rows(150), num_images=1, scale=10.0), "both"),
        "bf16": whole_gradient(bf16, "both"),
        "random, two views": gradient(views, "both"),
        "random, two views, scaled by 2^60": gradient(views, "both", size=2.0**60),
        "random, two views, tiny": gradient(views, "both", size=2.0**-60),
        "random, bf16, scale on the device": gradient(random_bf16._replace(scale_on_device=True, beta=0.5), "both"),
        "random, not factored by temperature": gradient(views._replace(scale=100.0), "both"),
        "random, two sets by rows": gradient(random, "rows"),
        "random, two sets by columns": gradient(random, "rows", by_columns=True),
        "random, two sets, both as anchors": gradient(random, "both"),
        **{f"{features} features, {name}": sweep for features in (64, 256) for name, sweep in _other_sweeps(features)},
    }  # fmt: skip


def _other_sweeps(features: int) -> list[tuple[str, Backward]]:
    """Every kernel of another number of features than 128."""
    calls = dict(_other_sizes(features))
    whole = calls["two views, ragged"]
    sets = calls["stages filled again"]
    return [
        ("two views, ragged", whole_gradient(whole, "both")),
        ("two views, ragged, not factored", whole_gradient(whole._replace(unit=False), "both")),
        ("bf16, ids", whole_gradient(calls["bf16, ids"], "both")),
        ("two sets by rows", whole_gradient(sets, "rows")),
        ("two sets by columns", whole_gradient(sets, "rows", by_columns=True)),
        ("columns as anchors, two splits", whole_gradient(sets._replace(splits=2), "columns")),
        ("random", gradient(calls["random"], "rows")),
        ("random, by columns", gradient(calls["random"], "rows", by_columns=True)),
        ("random, at a low temperature", gradient(calls["random, at a low temperature"], "both")),
    ]


def check_backward(sweep: Backward, schedule: Schedule) -> None:
    """Raises if the machine or the numbers object."""
    got, _ = sweep.sweep(schedule, shared_base=1024 if schedule.at_once else 1040)
    if sweep.call.scale == LN2:
        np.testing.assert_array_equal(got, sweep.exact())
        return
    expected, error = sweep.truth()
    beyond = np.abs(got - expected) > error
    assert not beyond.any() and not np.isnan(got).any(), (
        f"{beyond.sum()} of {got.size} beyond the error of rounded weights, the worst by a factor of "
        f"{np.nanmax(np.abs(got - expected) / np.maximum(error, 1e-45)):.3g}"
    )


def why_not(program: str) -> str | None:
    """Why a program cannot be had here."""
    if program in ("forward", "columns", "backward"):
        return None if kernels.cuda_gate.find_nvcc() else "nvcc was not found (CUDA_HOME, PATH)."
    release = tuple(map(int, version("triton").split(".")[:2]))
    if program == "ring" and release < (3, 9):
        return "the ring is written in the Gluon of Triton 3.9."
    if program == "sm_90" and release < (3, 7):
        return "Triton 3.6 leaves out the proxy fence between cp.async and WGMMA: the machine refuses its code."
    return None


@lru_cache
def runner(program: str) -> tuple[str, Callable[[str, Schedule], bool]]:
    """(text of a program that is right, a function of a text and a schedule: whether every bit of its result is)."""
    if program in ("forward", "columns"):
        call = Forward(whole_rows(128), whole_rows(5 * 128, 1), scale=LN2, columns=program == "columns")
        text = kernels.only_entry(kernels.forward_ptx(), kernels.entry_of(128, False, call.columns))
        return text, lambda text, schedule: call.is_exact(call.sweep(schedule, text))
    if program == "backward":
        sweep = whole_gradient(Forward(whole_rows(128), whole_rows(5 * 128, 1), scale=LN2), "both")
        text = kernels.only_entry(kernels.ptx_of("row_stats_backward"), backward.entry_of(128, False, 2))
        return text, lambda text, schedule: bool((sweep.sweep(schedule, text)[0] == sweep.exact()).all())
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
