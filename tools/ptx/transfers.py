"""Loads and stores of ordinary instructions: parameters, global and shared memory, matrices in shared memory."""

from __future__ import annotations

import numpy as np

from .arithmetic import instruction
from .errors import PtxError
from .lanes import whole
from .memory import GLOBAL_BASE, PARAMETER_BASE, SHARED_BASE
from .parser import FILE, WIDTH, Address, Imm, Reg, Vector
from .registers import view_of

SPACES = ("param", "global", "shared", "const", "local")


def address_of(pool, address: Address, kind: str = ""):
    """A function of the warp: the addresses of all lanes."""
    base, offset = address.base, address.offset
    kind = kind or ("u64" if isinstance(base, Reg) and base.file == "b64" else "u32")
    if isinstance(base, Imm):
        kind = "u64" if base.value >> 32 else "u32"
    row = pool.row(base, kind)
    return lambda w: w.rows[kind][row].astype(np.int64) + offset


def _shape(ins) -> tuple[str, list[str], int]:
    """(space, types in the order written, numbers per lane)"""
    space = next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in SPACES), "generic")
    width = next((int(p[1:]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)
    return space, [p for p in ins.parts if p in WIDTH], width


def _space_of(addresses: np.ndarray, space: str) -> tuple[str, np.ndarray]:
    if space != "generic":
        return space, addresses
    first = int(addresses.flat[0])
    if first >= GLOBAL_BASE:
        return "global", addresses
    if first >= PARAMETER_BASE:
        return "param", addresses - PARAMETER_BASE
    return "shared", addresses - SHARED_BASE


@instruction("ld", "ldu")
def load(ins, pool):
    space, types, width = _shape(ins)
    kind, bytes_each = types[-1], WIDTH[types[-1]] // 8
    out = ins.operands[0]
    items = list(out.items) if isinstance(out, Vector) else [out]
    targets = [(i, r.file, r.index) for i, r in enumerate(items) if r is not None]
    where = address_of(pool, ins.operands[1])
    signed = kind[0] == "s"

    def run(w):
        of, addresses = _space_of(where(w)[w.mask], space)
        raw = w.block.read(w, of, addresses, bytes_each * width)
        numbers = raw.reshape(len(addresses), width, bytes_each)
        for i, file, row in targets:
            bits = np.ascontiguousarray(numbers[:, i]).view(f"{'i' if signed else 'u'}{bytes_each}").ravel()
            w.rows[view_of(file)][row][w.mask] = bits.astype(f"i{max(bytes_each, 2)}" if signed else bits.dtype)

    return run


@instruction("st")
def store(ins, pool):
    space, types, _ = _shape(ins)
    kind, bytes_each = types[-1], WIDTH[types[-1]] // 8
    value = ins.operands[1]
    items = list(value.items) if isinstance(value, Vector) else [value]
    sources = []
    for item in items:
        file = item.file if isinstance(item, Reg) else FILE[WIDTH[kind]]
        sources.append((view_of(file), pool.row(item, file)))
    where = address_of(pool, ins.operands[0])

    def run(w):
        of, addresses = _space_of(where(w)[w.mask], space)
        data = [
            w.rows[v][r][w.mask].astype(f"u{bytes_each}").view(np.uint8).reshape(-1, bytes_each) for v, r in sources
        ]
        w.block.write(w, of, addresses, np.concatenate(data, 1))

    return run


def _matrices(ins) -> tuple[int, bool]:
    count = next(int(p[1:]) for p in ins.parts if p in ("x1", "x2", "x4"))
    if "m8n8" not in ins.parts or "b16" not in ins.parts:
        raise PtxError("instruction", f"{ins.op} is not modelled")
    return count, "trans" in ins.parts


@instruction("ldmatrix")
def load_matrix(ins, pool):
    """Matrix i has its eight rows at the addresses of lanes 8 i to 8 i + 7; lane l gets two numbers of row l / 4."""
    count, transposed = _matrices(ins)
    rows, where = [pool.row(r, "u32") for r in ins.operands[0].items], address_of(pool, ins.operands[1])

    def run(w):
        whole(w)
        raw = w.block.shared_rows(w, where(w)[: 8 * count])
        matrices = raw.view(np.uint16).reshape(count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        for row, matrix in zip(rows, matrices, strict=True):
            w.rows["u32"][row][:] = np.ascontiguousarray(matrix).view(np.uint32).ravel()

    return run


@instruction("stmatrix")
def store_matrix(ins, pool):
    count, transposed = _matrices(ins)
    where, rows = address_of(pool, ins.operands[0]), [pool.row(r, "u32") for r in ins.operands[1].items]

    def run(w):
        whole(w)
        matrices = np.stack([w.rows["u32"][r] for r in rows]).view(np.uint16).reshape(count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        data = np.ascontiguousarray(matrices).view(np.uint8).reshape(8 * count, 16)
        # a row of eight numbers comes from four lanes; the address is one lane's
        w.block.write_rows(w, where(w)[: 8 * count], data)

    return run


ATOMIC = {
    "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x, "exch": lambda old, x: x,
}  # fmt: skip


@instruction("red", "atom")
def atomic(ins, pool):
    """red.global.op.type [a], b and atom.global.op.type d, [a], b; lanes and blocks in the schedule's order."""
    space, types, width = _shape(ins)
    operation = next((ATOMIC[p] for p in ins.parts if p in ATOMIC), None)
    kind = types[-1]
    if space != "global" or operation is None or width > 1 or kind in ("f16", "bf16", "f16x2", "bf16x2"):
        raise PtxError("instruction", f"{ins.op} is not modelled")
    answers = ins.parts[0] == "atom"
    d = pool.row(ins.operands[0], kind) if answers and ins.operands[0] is not None else None
    where = address_of(pool, ins.operands[answers])
    value, view, size = pool.row(ins.operands[1 + answers], kind), view_of(kind), WIDTH[kind] // 8

    def run(w):
        values = w.rows[view][value]
        for lane, address in zip(w.lanes, where(w)[w.mask], strict=True):
            at = w.block.memory.atomic(w.block.number, address, size)
            old = at.view(values.dtype)[0]
            at.view(values.dtype)[0] = operation(old, values[lane])
            if d is not None:
                w.rows[view][d][lane] = old
            w.block.memory.bytes[address - GLOBAL_BASE : address - GLOBAL_BASE + size] = at

    return run
