"""What instructions on registers compute: sums, products, elementary functions.

A builder takes an instruction and returns a function of the warp. The other files that define instructions use what
stands on top here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .parser import WIDTH, Instruction
from .registers import Pool, view_of

Run = Callable[..., object]
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
SEMANTICS: dict[str, Callable[[Instruction, Pool], Run]] = {}


def instruction(*names: str):
    """Registers the builder of instructions whose name begins so."""

    def register(build):
        SEMANTICS.update(dict.fromkeys(names, build))
        return build

    return register


def compute(ins: Instruction, pool: Pool, function, result: str, *operands: str, first: int = 1) -> Run:
    """d = function(operands), each seen as its type."""
    d, out = pool.row(ins.operands[0], result), view_of(result)
    rows = [pool.row(o, k) for o, k in zip(ins.operands[first:], operands, strict=False)]
    views = [view_of(k) for k in operands]
    if len(rows) == 2:
        (a, b), (va, vb) = rows, views

        def run(w):
            w.put(out, d, function(w.rows[va][a], w.rows[vb][b]))
    else:

        def run(w):
            w.put(out, d, function(*(w.rows[v][r] for v, r in zip(views, rows, strict=True))))

    return run


def kind_of(ins: Instruction) -> str:
    return ins.parts[-1]


def is_float(kind: str) -> bool:
    return kind in ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")


def rounding(ins: Instruction) -> str:
    return next((p for p in ins.parts if p in ("rn", "rm", "rp", "rz", "rna")), "rn")


def flushed(ins: Instruction, function):
    """With subnormals as zeros, and saturated to [0, 1], where the instruction says so."""
    if "ftz" in ins.parts:
        inner = function

        def function(*x):
            return floats.flush(inner(*map(floats.flush, x)))

    if "sat" in ins.parts:
        unbounded = function

        def function(*x):
            y = unbounded(*x)
            return np.where(np.isnan(y), y.dtype.type(0), np.clip(y, 0, 1))

    exact = function

    def with_one_nan(*x):
        """Numpy's NaNs keep bits of their operands; the hardware has one, so that lanes agree on it."""
        y = exact(*x)
        bad = np.isnan(y)
        return np.where(bad, NAN, y) if y.dtype == np.float32 and bad.any() else y

    return with_one_nan


def halves(kind: str, function):
    """A function of float32 numbers for packed or single 16-bit floats."""
    if kind.endswith("x2"):

        def packed(*x):
            pairs = [floats.half_pairs(v, kind) for v in x]
            return floats.pack_halves(function(*(p[0] for p in pairs)), function(*(p[1] for p in pairs)), kind)

        return packed
    if kind == "bf16":
        return lambda *x: floats.to_bf16(function(*(floats.from_bf16(v) for v in x)))
    return lambda *x: function(*(v.astype(np.float32) for v in x)).astype(np.float16)


def arithmetic(ins: Instruction, pool: Pool, on_floats, on_integers, count: int) -> Run:
    """The same operation on every type."""
    kind = kind_of(ins)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return compute(ins, pool, halves(kind, on_floats), kind, *[kind] * count)
    return compute(ins, pool, flushed(ins, on_floats) if is_float(kind) else on_integers, kind, *[kind] * count)


def _wrapping(ins: Instruction, operation) -> Callable:
    """Integer arithmetic modulo 2^n, or saturated (.sat of s32)."""
    if "sat" not in ins.parts:
        return operation
    info = np.iinfo(np.int32)
    return lambda a, b: np.clip(operation(a.astype(np.int64), b.astype(np.int64)), info.min, info.max)


def directed(ins: Instruction, operation):
    """A float operation in the rounding mode of the instruction."""
    mode, kind = rounding(ins), kind_of(ins)
    if mode == "rn" or kind != "f32":
        return operation
    return lambda a, b: floats.round32(operation(a.astype(np.float64), b.astype(np.float64)), mode)


@instruction("add")
def add(ins, pool):
    return arithmetic(ins, pool, directed(ins, np.add), _wrapping(ins, np.add), 2)


@instruction("sub")
def sub(ins, pool):
    return arithmetic(ins, pool, directed(ins, np.subtract), _wrapping(ins, np.subtract), 2)


def high_product(a, b):
    if a.dtype.itemsize < 8:
        return (a.astype(np.int64) * b.astype(np.int64)) >> (8 * a.dtype.itemsize)
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], object).astype(a.dtype)


def wider(kind: str) -> str:
    return kind[0] + str(2 * WIDTH[kind])


def widened(kind: str, a, b):
    dtype = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}[kind]
    return a.astype(dtype) * b.astype(dtype)


@instruction("mul")
def mul(ins, pool):
    kind = kind_of(ins)
    if "wide" in ins.parts:
        return compute(ins, pool, lambda a, b: widened(kind, a, b), wider(kind), kind, kind)
    return arithmetic(ins, pool, directed(ins, np.multiply), high_product if "hi" in ins.parts else np.multiply, 2)


@instruction("mad")
def mad(ins, pool):
    kind = kind_of(ins)
    if is_float(kind):
        return fma(ins, pool)
    if "wide" in ins.parts:
        return compute(ins, pool, lambda a, b, c: widened(kind, a, b) + c, wider(kind), kind, kind, wider(kind))
    product = high_product if "hi" in ins.parts else np.multiply
    return compute(ins, pool, lambda a, b, c: product(a, b) + c, kind, kind, kind, kind)


@instruction("fma")
def fma(ins, pool):
    kind, mode = kind_of(ins), rounding(ins)
    if kind == "f64":
        return compute(ins, pool, floats.fma64, kind, kind, kind, kind)
    if kind == "f32":
        return compute(ins, pool, flushed(ins, lambda a, b, c: floats.fma32(a, b, c, mode)), kind, kind, kind, kind)
    exact = halves(kind, lambda a, b, c: a.astype(np.float64) * b + c)
    return compute(ins, pool, exact, kind, kind, kind, kind)


def truncated(a, b):
    """Integer quotient towards zero; all bits set for a divisor of zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


@instruction("div")
def div(ins, pool):
    return arithmetic(ins, pool, np.divide, truncated, 2)


@instruction("rem")
def rem(ins, pool):
    return arithmetic(ins, pool, None, lambda a, b: np.where(b == 0, a, a - truncated(a, b) * b), 2)


@instruction("min", "max")
def extreme(ins, pool):
    least = ins.parts[0] == "min"
    if "NaN" in ins.parts:
        on_floats = np.minimum if least else np.maximum
    else:
        on_floats = np.fmin if least else np.fmax
    count = len(ins.operands) - 1
    if count == 3:
        return compute(ins, pool, lambda a, b, c: on_floats(on_floats(a, b), c), *[kind_of(ins)] * 4)
    return arithmetic(ins, pool, on_floats, np.minimum if least else np.maximum, 2)


@instruction("abs")
def absolute(ins, pool):
    return arithmetic(ins, pool, np.abs, np.abs, 1)


@instruction("neg")
def negative(ins, pool):
    return arithmetic(ins, pool, np.negative, np.negative, 1)


@instruction("copysign")
def copysign(ins, pool):
    return compute(ins, pool, lambda sign, x: np.copysign(x, sign), *[kind_of(ins)] * 3)


# correctly rounded where the hardware approximates: exact for powers of two, within its error bound elsewhere
ROOTS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*ROOTS)
def elementary(ins, pool):
    exact = ROOTS[ins.parts[0]]
    kind = kind_of(ins)
    if kind == "f64":
        return compute(ins, pool, exact, kind, kind)
    in_double = lambda x: exact(x.astype(np.float64)).astype(np.float32)  # noqa: E731
    return arithmetic(ins, pool, in_double, None, 1)
