"""What instructions on registers compute. A builder takes an instruction and returns a function of the warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .errors import PtxError
from .parser import FILE, WIDTH, Imm, Instruction, Not, Pair, Reg, Vector
from .registers import Pool, view_of

Run = Callable[..., object]
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

    return function


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
        if a.dtype.kind == "u" and 0 < n and p + n <= bits and (position == p).all() and (length == n).all():
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


@instruction("mov")
def move(ins, pool):
    kind = kind_of(ins)
    to, source = ins.operands
    if isinstance(source, Vector):
        part = kind[0] + str(WIDTH[kind] // len(source.items))
        rows, d = [pool.row(s, part) for s in source.items], pool.row(to, kind)
        view, out, step = view_of(part), view_of(kind), WIDTH[part]

        def pack(w):
            value = w.rows[view][rows[0]].astype(np.uint64)
            for i, r in enumerate(rows[1:], 1):
                value |= w.rows[view][r].astype(np.uint64) << np.uint64(i * step)
            w.put(out, d, value)

        return pack
    if isinstance(to, Vector):
        part = kind[0] + str(WIDTH[kind] // len(to.items))
        a, step = pool.row(source, kind), WIDTH[part]
        places = [(i, pool.row(t, part)) for i, t in enumerate(to.items) if t is not None]

        def unpack(w):
            value = w.rows[view_of(kind)][a].astype(np.uint64)
            for i, d in places:
                w.put(view_of(part), d, (value >> np.uint64(i * step)) & np.uint64((1 << step) - 1))

        return unpack
    return compute(ins, pool, lambda a: a, kind, kind)


@instruction("cvta")
def convert_address(ins, pool):
    from .memory import PARAMETER_BASE, SHARED_BASE

    space = next((p for p in ins.parts[1:] if p in ("global", "shared", "param", "local", "const")), "global")
    base = np.uint64({"shared": SHARED_BASE, "param": PARAMETER_BASE}.get(space, 0))
    to = "to" in ins.parts
    return compute(ins, pool, lambda a: a - base if to else a + base, "u64", "u64")


INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(ins, pool):
    """cvt[.rounding][.ftz][.sat].to.from"""
    parts = [p for p in ins.parts[1:] if p in WIDTH]
    to, source = parts[0], parts[-1]
    if to.endswith("x2"):
        relu = "relu" in ins.parts
        pack = lambda a, b: floats.pack_halves(b, a, to)  # noqa: E731
        return compute(
            ins, pool, (lambda a, b: pack(np.maximum(a, 0), np.maximum(b, 0))) if relu else pack, to, source, source
        )
    register = ins.operands[1]
    stored = register.file if isinstance(register, Reg) else FILE[WIDTH[source]]
    target = ins.operands[0].file
    read = _reader(source)
    write = _writer(ins, source, to)
    a, d = pool.row(register, stored), pool.row(ins.operands[0], target)
    raw, out = view_of(stored), view_of(target)

    def run(w):
        w.put(out, d, write(read(w.rows[raw][a])))

    return run


def _reader(kind: str):
    """Stored bits to numbers."""
    if kind == "bf16":
        return floats.from_bf16
    dtype = {"u": f"u{WIDTH[kind] // 8}", "b": f"u{WIDTH[kind] // 8}", "s": f"i{WIDTH[kind] // 8}"}.get(
        kind[0], f"f{WIDTH[kind] // 8}"
    )
    unsigned = np.dtype(f"u{WIDTH[kind] // 8}")
    return lambda x: x.astype(unsigned).view(dtype)


def _writer(ins: Instruction, source: str, to: str):
    """Numbers to stored bits."""
    mode, bits = rounding(ins), WIDTH[to]
    if to == "tf32":
        return lambda x: floats.to_tf32(x, mode)
    if is_float(to):
        whole = next((INTEGER[p] for p in ins.parts if p in INTEGER), None)

        def to_float(x):
            if whole is not None:
                x = whole(x)
            if to == "bf16":
                return floats.to_bf16(x.astype(np.float32), mode)
            if mode != "rn" and to == "f32":
                y = floats.round32(x.astype(np.float64), mode)
            elif mode != "rn":
                raise PtxError("instruction", f"rounding {mode} to {to} is not modelled")
            else:
                y = x.astype(f"f{bits // 8}")
            return y

        return lambda x: flushed(ins, to_float)(x).view(f"u{bits // 8}")
    info = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{bits // 8}")
    if is_float(source):
        whole = next((INTEGER[p] for p in ins.parts if p in INTEGER), np.trunc)

        def to_integer(x):
            y = whole(x.astype(np.float64))
            inside = np.where(np.isnan(y), 0, np.clip(y, info.min, info.max))
            exact = np.array([min(max(int(v), info.min), info.max) for v in inside], info.dtype)
            return exact.view(f"u{bits // 8}")

        return to_integer
    if "sat" in ins.parts:
        return lambda x: np.array([min(max(int(v), info.min), info.max) for v in x], info.dtype)
    return lambda x: x.astype(info.dtype)
