"""Registers of a warp, numbers among the operands included: every operand of an instruction is a row of 32 lanes.

A row is seen through the type of the instruction that uses it: rows["f32"][3] and rows["u32"][3] are the same bytes.
"""

from __future__ import annotations

import numpy as np

from .errors import PtxError
from .parser import FILE, WIDTH, Address, Entry, Imm, Instruction, Not, Pair, Reg, Symbol, Vector

LANES = 32
STORED = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
VIEWS = {
    "pred": {"pred": np.bool_},
    "b16": {"u16": np.uint16, "s16": np.int16, "f16": np.float16},
    "b32": {"u32": np.uint32, "s32": np.int32, "f32": np.float32},
    "b64": {"u64": np.uint64, "s64": np.int64, "f64": np.float64},
}
ALIAS = {"b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16", "f16x2": "u32", "bf16x2": "u32", "tf32": "u32"}
ALIAS |= {"b8": "u16", "u8": "u16", "s8": "s16"}


def view_of(kind: str) -> str:
    """The view through which a type is computed."""
    return ALIAS.get(kind, kind)


class Pool:
    """Where the registers, numbers and symbols of an entry are."""

    def __init__(self, entry: Entry):
        self.sizes = dict(entry.sizes)
        self.numbers: dict[tuple[str, int], int] = {}  # (file, bits) -> row
        self.symbols: dict[tuple[str, str], int] = {}  # (file, name) -> row

    def row(self, operand, kind: str) -> int:
        """The row of an operand that an instruction uses as `kind`."""
        file = FILE[WIDTH[kind]]
        if isinstance(operand, Reg):
            if operand.file != file:
                raise PtxError("instruction", f"a {operand.file} register where {kind} is wanted")
            return operand.index
        if isinstance(operand, Imm):
            bits = WIDTH[kind]
            if operand.bits and operand.bits != bits:
                raise PtxError("instruction", f"a number of {operand.bits} bits where {kind} is wanted")
            value = operand.value & ((1 << bits) - 1) if file != "pred" else int(operand.value != 0)
            return self._constant(self.numbers, (file, value), file)
        if isinstance(operand, Symbol):
            return self._constant(self.symbols, (file, operand.name), file)
        raise PtxError("instruction", f"operand {operand!r} is not understood")

    def _constant(self, known: dict, key: tuple, file: str) -> int:
        if key not in known:
            known[key] = self.sizes[file]
            self.sizes[file] += 1
        return known[key]

    def new(self, symbols: dict[str, np.ndarray | int]) -> dict[str, list[np.ndarray]]:
        """The rows of a fresh warp, by view. `symbols`: what each is worth."""
        rows: dict[str, list[np.ndarray]] = {}
        for file, kind in STORED.items():
            data = np.zeros((self.sizes[file], LANES), kind)
            for (of, value), row in self.numbers.items():
                if of == file:
                    data[row] = value
            for (of, name), row in self.symbols.items():
                if of == file:
                    if name not in symbols:
                        raise PtxError("instruction", f"the symbol {name} is not known")
                    data[row] = symbols[name]
            for view, dtype in VIEWS[file].items():
                rows[view] = list(data.view(dtype))
        return rows


def registers_of(operand) -> list[Reg]:
    """All registers that an operand names."""
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Not):
        return [operand.register]
    if isinstance(operand, Pair):
        return registers_of(operand.first) + registers_of(operand.second)
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in registers_of(item)]
    if isinstance(operand, Address):
        return registers_of(operand.base) + [r for c in operand.coordinates for r in registers_of(c)]
    return []


NO_RESULT = ("st", "bar", "barrier", "bra", "ret", "cp", "fence", "wgmma", "stmatrix", "red", "mbarrier", "membar")


def touched(instruction: Instruction) -> tuple[frozenset[Reg], frozenset[Reg]]:
    """(all registers of an instruction, those that it writes)"""
    everything = {r for o in instruction.operands for r in registers_of(o)}
    if instruction.guard is not None:
        everything.add(instruction.guard)
    writes = () if instruction.parts[0] in NO_RESULT else registers_of(instruction.operands[0])
    return frozenset(everything), frozenset(writes)
