"""Instructions in which the lanes of a warp meet: shuffles, votes, reductions, matrices in registers (mma.sync)."""

from __future__ import annotations

import numpy as np

from . import floats
from .arithmetic import instruction
from .errors import PtxError
from .parser import Imm, Pair
from .registers import LANES, view_of

LANE = np.arange(LANES)


def together(w, member_mask: int) -> None:
    """All lanes of the mask must be here, and every lane here in it."""
    here = w.active_bits()
    if here & ~member_mask or member_mask & ~here:
        raise PtxError("divergence", f"lanes {here:#010x} execute it together, its mask names {member_mask:#010x}")


def whole(w) -> None:
    """.aligned: all lanes of the warp execute it."""
    if w.active_bits() != 0xFFFFFFFF:
        raise PtxError("divergence", f"only lanes {w.active_bits():#010x} execute an instruction of the whole warp")


def _mask(pool, operand):
    row = pool.row(operand, "u32")

    def value(w) -> int:
        return int(w.rows["u32"][row][w.lanes[0]])

    return value


@instruction("shfl")
def shuffle(ins, pool):
    """shfl.sync.mode.b32 d|p, a, b, c, mask"""
    mode, out = ins.parts[2], ins.operands[0]
    d = pool.row(out.first if isinstance(out, Pair) else out, "u32")
    p = pool.row(out.second, "pred") if isinstance(out, Pair) else None
    a, b, c = (pool.row(o, "u32") for o in ins.operands[1:4])
    mask = _mask(pool, ins.operands[4])

    def run(w):
        together(w, mask(w))
        values, by = w.rows["u32"][a], (w.rows["u32"][b] & 31).astype(np.int64)
        clamp = w.rows["u32"][c].astype(np.int64)
        segment = clamp >> 8 & 31
        least, most = LANE & segment, (LANE & segment) | (clamp & 31 & ~segment)
        if mode == "up":
            source = LANE - by
            valid = source >= most
        elif mode == "idx":
            source = least | (by & ~segment)
            valid = source <= most
        else:
            source = LANE + by if mode == "down" else LANE ^ by
            valid = source <= most
        source = np.where(valid, source, LANE)
        if not w.mask[source[w.mask]].all():
            raise PtxError("divergence", "a lane reads the register of one that is not here")
        w.put("u32", d, values[source])
        if p is not None:
            w.put("pred", p, valid)

    return run


@instruction("elect")
def elect(ins, pool):
    """elect.sync d|p, mask: the lowest lane."""
    out, mask = ins.operands[0], _mask(pool, ins.operands[1])
    d = None if out.first is None else pool.row(out.first, "u32")
    p = pool.row(out.second, "pred")

    def run(w):
        together(w, mask(w))
        leader = w.lanes[0]
        if d is not None:
            w.put("u32", d, np.full(LANES, leader, np.uint32))
        w.put("pred", p, leader == LANE)

    return run


@instruction("redux")
def reduce(ins, pool):
    """redux.sync.op.type d, a, mask"""
    operation, kind = ins.parts[2], ins.parts[-1]
    d, a, mask = pool.row(ins.operands[0], kind), pool.row(ins.operands[1], kind), _mask(pool, ins.operands[2])
    view = view_of(kind)
    function = {
        "add": np.add.reduce, "min": np.min, "max": np.max, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }[operation]  # fmt: skip

    def run(w):
        together(w, mask(w))
        values = w.rows[view][a][w.mask]
        w.put(view, d, np.full(LANES, function(values), values.dtype))

    return run


@instruction("vote")
def vote(ins, pool):
    """vote.sync.mode.type d, p, mask"""
    mode = ins.parts[2]
    out = "u32" if mode == "ballot" else "pred"
    d, p, mask = pool.row(ins.operands[0], out), pool.row(ins.operands[1], "pred"), _mask(pool, ins.operands[2])

    def run(w):
        together(w, mask(w))
        votes = w.rows["pred"][p] & w.mask
        if mode == "ballot":
            answer: object = np.uint32(sum(1 << int(lane) for lane in np.flatnonzero(votes)))
        else:
            of = votes[w.mask]
            answer = {"all": of.all(), "any": of.any(), "uni": of.all() or not of.any()}[mode]
        w.put(out, d, np.full(LANES, answer))

    return run


@instruction("activemask")
def active_mask(ins, pool):
    d = pool.row(ins.operands[0], "u32")
    return lambda w: w.put("u32", d, np.full(LANES, w.active_bits(), np.uint32))


# Fragments of mma.sync and wgmma: lane l = 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of every eight.


def operand_values(w, rows: list[int], kind: str) -> np.ndarray:
    """The numbers in registers: [registers, lanes, numbers of a register] as float64."""
    bits = np.stack([w.rows["u32"][r] for r in rows])
    if kind in ("f16", "bf16"):
        return np.stack(floats.half_pairs(bits, kind), -1).astype(np.float64)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]  # TF32: the rest is ignored


def fragment_a(values: np.ndarray) -> np.ndarray:
    """A [16, k] from four registers: rows g and g + 8, then the same of the columns' other half."""
    per = values.shape[-1]
    by = values.reshape(2, 2, 8, 4, per)  # half of the columns, half of the rows, g, t, number
    return by.transpose(1, 2, 0, 3, 4).reshape(16, 8 * per)


def fragment_b(values: np.ndarray) -> np.ndarray:
    """B [k, 8] from two registers."""
    per = values.shape[-1]
    return values.reshape(2, 8, 4, per).transpose(0, 2, 3, 1).reshape(8 * per, 8)  # from half, g, t, number


def accumulators(rows: np.ndarray) -> np.ndarray:
    """[16, n] from n / 2 registers of every lane."""
    n = 2 * len(rows)
    by = rows.reshape(n // 8, 2, 2, 8, 4)  # j, h, e, g, t
    return by.transpose(1, 3, 0, 4, 2).reshape(16, n)


def to_registers(d: np.ndarray) -> np.ndarray:
    """The opposite: [n / 2, lanes]."""
    n = d.shape[1]
    by = d.reshape(2, 8, n // 8, 4, 2)  # h, g, j, t, e
    return by.transpose(2, 0, 4, 1, 3).reshape(n // 2, LANES)


@instruction("mma")
def multiply(ins, pool):
    """mma.sync.aligned.shape.row.col.d.a.b.c d, a, b, c; sums in float64, rounded once"""
    shape, kind = ins.parts[3], ins.parts[7]
    wanted = {"f16": "m16n8k16", "bf16": "m16n8k16", "tf32": "m16n8k8"}.get(kind)
    if ins.parts[4:6] != ["row", "col"] or ins.parts[6] != "f32" or shape != wanted:
        raise PtxError("instruction", f"{ins.op} is not modelled")
    d, a, b, c = (
        [pool.row(r, k) for r in o.items] for o, k in zip(ins.operands, ("f32", "u32", "u32", "f32"), strict=True)
    )

    def run(w):
        whole(w)
        left, right = fragment_a(operand_values(w, a, kind)), fragment_b(operand_values(w, b, kind))
        old = accumulators(np.stack([w.rows["f32"][r] for r in c]))
        for row, value in zip(d, to_registers((left @ right + old).astype(np.float32)), strict=True):
            w.rows["f32"][row][:] = value
        w.count("flops", 2 * 16 * 8 * left.shape[1])

    return run


def constant(operand) -> int:
    """An operand that must be a number."""
    if not isinstance(operand, Imm):
        raise PtxError("instruction", f"{operand!r} is no number")
    return operand.value
