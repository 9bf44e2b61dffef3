"""Moves and conversions between types and address spaces."""

from __future__ import annotations

import numpy as np

from . import floats
from .arithmetic import compute, flushed, instruction, is_float, kind_of, rounding
from .errors import PtxError
from .memory import PARAMETER_BASE, SHARED_BASE
from .parser import FILE, WIDTH, Instruction, Reg, Vector
from .registers import view_of


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
