"""Logic, shifts and fields of bits; comparisons and selections."""

from __future__ import annotations

import numpy as np

from . import floats
from .arithmetic import compute, instruction, is_float, kind_of
from .parser import WIDTH, Imm, Not, Pair
from .registers import view_of


def _bitwise(ins, pool, operation, logical, count):
    kind = kind_of(ins)
    return compute(ins, pool, logical if kind == "pred" else operation, kind, *[kind] * count)


@instruction("and")
def bit_and(ins, pool):
    return _bitwise(ins, pool, np.bitwise_and, np.logical_and, 2)


@instruction("or")
def bit_or(ins, pool):
    return _bitwise(ins, pool, np.bitwise_or, np.logical_or, 2)


@instruction("xor")
def bit_xor(ins, pool):
    return _bitwise(ins, pool, np.bitwise_xor, np.logical_xor, 2)


@instruction("not")
def bit_not(ins, pool):
    return _bitwise(ins, pool, np.bitwise_not, np.logical_not, 1)


@instruction("shl", "shr")
def shift(ins, pool):
    kind, left = kind_of(ins), ins.parts[0] == "shl"
    bits = WIDTH[kind]

    def shifted(a, s):
        inside = np.minimum(s, bits - 1).astype(a.dtype)
        if left:
            return np.where(s >= bits, a.dtype.type(0), a << inside)
        moved = a >> inside
        return moved if a.dtype.kind == "i" else np.where(s >= bits, a.dtype.type(0), moved)

    return compute(ins, pool, shifted, kind, kind, "u32")


@instruction("shf")
def funnel(ins, pool):
    left, wrap = "l" in ins.parts, "wrap" in ins.parts

    def shifted(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return compute(ins, pool, shifted, "u32", "u32", "u32", "u32")


@instruction("bfe")
def extract(ins, pool):
    kind = kind_of(ins)
    bits = WIDTH[kind]

    def extracted(a, position, length):
        position, length = (position & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        signed = a.dtype.kind == "i"
        out = []
        for value, p, n in zip(a.tolist(), position.tolist(), length.tolist(), strict=True):
            if n == 0:
                out.append(0)
            elif signed and p + n >= bits:
                out.append(value >> min(p, bits - 1))
            else:
                field = (value >> p) & ((1 << n) - 1)
                out.append(field - (1 << n) if signed and field >> (n - 1) else field)
        return np.array(out, a.dtype)

    def uniform(a, position, length):
        p, n = int(position[0]) & 0xFF, int(length[0]) & 0xFF
        if a.dtype.kind == "u" and n > 0 and p + n <= bits and (position == p).all() and (length == n).all():
            return (a >> a.dtype.type(p)) & a.dtype.type((1 << n) - 1)
        return extracted(a, position, length)

    return compute(ins, pool, uniform, kind, kind, "u32", "u32")


@instruction("bfi")
def insert(ins, pool):
    kind = kind_of(ins)

    def inserted(a, b, position, length):
        out = []
        for x, y, p, n in zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True):
            field = ((1 << (n & 0xFF)) - 1) << (p & 0xFF)
            out.append((y & ~field | (x << (p & 0xFF)) & field) & ((1 << WIDTH[kind]) - 1))
        return np.array(out, a.dtype)

    return compute(ins, pool, inserted, kind, kind, kind, "u32", "u32")


def _each(function):
    return lambda a: np.array([function(int(x)) for x in a], np.uint32)


@instruction("popc")
def population(ins, pool):
    return compute(ins, pool, _each(lambda x: bin(x).count("1")), "u32", kind_of(ins))


@instruction("clz")
def leading_zeros(ins, pool):
    bits = WIDTH[kind_of(ins)]
    return compute(ins, pool, _each(lambda x: bits - x.bit_length()), "u32", kind_of(ins))


@instruction("brev")
def reverse(ins, pool):
    bits = WIDTH[kind_of(ins)]
    return compute(ins, pool, _each(lambda x: int(f"{x:0{bits}b}"[::-1], 2)), kind_of(ins), kind_of(ins))


@instruction("prmt")
def permute(ins, pool):
    def permuted(a, b, selector):
        source = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
        out = np.zeros((len(a), 4), np.uint8)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
            byte = source[np.arange(len(a)), (nibble & 7).astype(np.int64)]
            out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        return out.view(np.uint32).ravel()

    return compute(ins, pool, permuted, "u32", "u32", "u32", "u32")


@instruction("lop3")
def logic3(ins, pool):
    table = ins.operands[4].value

    def looked_up(a, b, c):
        out = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return compute(ins, pool, looked_up, "u32", "u32", "u32", "u32")


@instruction("selp")
def select(ins, pool):
    kind = kind_of(ins)
    return compute(ins, pool, lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: str):
    """A comparison; of floats `ne` is false with a NaN and the ones that end in u are true."""
    if not is_float(kind):
        return COMPARE[name]
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name in COMPARE:
        return COMPARE[name]
    return lambda a, b: COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)


@instruction("setp")
def set_predicate(ins, pool):
    kind, compare = kind_of(ins), comparison(ins.parts[1], kind_of(ins))
    if kind == "bf16":
        compare = lambda a, b, c=compare: c(floats.from_bf16(a), floats.from_bf16(b))  # noqa: E731
    logic = next((p for p in ins.parts[2:-1] if p in ("and", "or", "xor")), None)
    out = ins.operands[0]
    if logic is None and not isinstance(out, Pair):
        return compute(ins, pool, compare, "pred", kind, kind)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: lambda x, _: x}[logic]
    results = (out.first, out.second) if isinstance(out, Pair) else (out,)
    rows = [pool.row(r, "pred") for r in results]
    a, b = (pool.row(o, kind) for o in ins.operands[1:3])
    other = ins.operands[3] if logic else Imm(1, 0)
    negated = isinstance(other, Not)
    c = pool.row(other.register if negated else other, "pred")
    view = view_of(kind)

    def run(w):
        met = compare(w.rows[view][a], w.rows[view][b])
        with_what = w.rows["pred"][c] != negated
        for row, value in zip(rows, (met, ~met), strict=False):
            w.put("pred", row, combine(value, with_what))

    return run
