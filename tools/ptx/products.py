"""Products of a warpgroup (wgmma): matrix descriptors, and operations that happen between issue and wait.

Every warp computes its own 16 of the 64 rows; the four must issue the same sequence. From issue to wait the
accumulators are nobody's: an instruction that names one of them is an error, whether or not the product has happened.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from . import floats
from .arithmetic import instruction
from .errors import PtxError
from .lanes import accumulators, constant, fragment_a, operand_values, to_registers, whole
from .parser import Vector

SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}  # bits 62-63 -> bits of the address that move the 16-byte chunk: 128, 64, 32 bytes
SPAN = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of an atom


@lru_cache(maxsize=4096)
def operand_places(descriptor: int, count: int, features_first: bool) -> np.ndarray:
    """Byte positions [count, 32] of 16 features (8 of TF32) of `count` rows; `features_first` is K-major.

    PTX ISA, "Matrix Descriptor Format" and "Strides". Atoms of eight rows; K-major: the stride offset leads to the
    next eight rows, the leading one (without a swizzle) to the next 16 bytes of features. MN-major: the leading offset
    leads to the next atom of rows, the stride offset to the next eight features; without a swizzle the other way round.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    kind = descriptor >> 62
    span = SPAN[kind]
    if descriptor >> 49 & 7:
        raise PtxError("descriptor", f"{descriptor:#018x}: a base offset is not modelled")
    if descriptor & ~0xC00E_3FFF_3FFF_3FFF:
        raise PtxError("descriptor", f"{descriptor:#018x}: bits that mean nothing are set")
    byte = np.arange(16)
    if features_first:
        row, chunk = np.arange(count)[:, None], np.arange(2)
        at = start + row % 8 * span + row // 8 * stride + chunk * (leading if kind == 0 else 16)
        places = _swizzled(at, kind)[:, :, None] + byte
        return places.reshape(count, 32)
    feature, chunk = np.arange(16)[:, None], np.arange(count // 8)  # chunks of eight rows
    if kind == 0:
        at = start + chunk * stride + feature % 8 * 16 + feature // 8 * leading
    else:
        per = span // 16
        at = start + chunk % per * 16 + chunk // per * leading + feature % 8 * span + feature // 8 * stride
    places = _swizzled(at, kind)[:, :, None] + byte  # [feature, chunk, 16]
    return places.reshape(16, count, 2).transpose(1, 0, 2).reshape(count, 32)


def _swizzled(at: np.ndarray, kind: int) -> np.ndarray:
    return at ^ ((at >> 7 & SWIZZLE[kind]) << 4)


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """[rows, 32] bytes as numbers."""
    raw = np.ascontiguousarray(raw)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return floats.from_bf16(raw.view(np.uint16)).astype(np.float64)
    return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


class Product:
    """A product that a warp has issued."""

    def __init__(self, w, d, a, b, kinds, accumulate, signs, registers):
        self.w, self.d, self.a, self.b, self.kinds = w, d, a, b, kinds
        self.accumulate, self.signs = accumulate, signs
        self.accumulators, self.inputs = registers
        self.group = w.products_committed + 1
        self.done = False

    def happen(self) -> None:
        self.done = True
        w, memory = self.w, self.w.block.shared.bytes
        if isinstance(self.a, list):
            left = fragment_a(operand_values(w, self.a, self.kinds[0]))
        else:
            left = numbers(memory[self.a], self.kinds[0])
        right = numbers(memory[self.b], self.kinds[1])
        total = (left * self.signs[0]) @ (right * self.signs[1]).T
        rows = w.rows["f32"]
        if self.accumulate:
            total = total + accumulators(np.stack([rows[r] for r in self.d]))
        for row, value in zip(self.d, to_registers(total.astype(np.float32)), strict=True):
            rows[row][:] = value


@instruction("wgmma")
def wgmma(ins, pool):
    action = ins.parts[1]
    if action == "fence":

        def fence(w):
            whole(w)
            w.unfenced.clear()

        return fence
    if action == "commit_group":

        def commit(w):
            whole(w)
            w.products_committed += 1

        return commit
    if action == "wait_group":
        outstanding = constant(ins.operands[0])

        def wait(w):
            whole(w)
            w.wait_for_products(w.products_committed - outstanding)

        wait.visible = True  # type: ignore[attr-defined]
        return wait
    return _issue(ins, pool)


def _issue(ins, pool):
    """wgmma.mma_async.sync.aligned.shape.d.a.b d, a, b, accumulate, sign a, sign b, transposed a, transposed b"""
    _, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", ins.parts[4]).groups())
    kinds = ins.parts[6:8]
    if ins.parts[5] != "f32" or k != {"f16": 16, "bf16": 16, "tf32": 8}.get(kinds[0]):
        raise PtxError("instruction", f"{ins.op} is not modelled")
    d_operand, a_operand, b_operand, accumulate = ins.operands[:4]
    d = [pool.row(r, "f32") for r in d_operand.items]
    if len(d) != n // 2:
        raise PtxError("instruction", f"{len(d)} accumulators for {n} columns")
    in_registers = isinstance(a_operand, Vector)
    a = [pool.row(r, "u32") for r in a_operand.items] if in_registers else pool.row(a_operand, "u64")
    b, p = pool.row(b_operand, "u64"), pool.row(accumulate, "pred")
    tail = [constant(o) for o in ins.operands[4:]]
    signs, transposed = tail[:2], [0] * (2 - len(tail[2:])) + tail[2:]
    registers = frozenset(d_operand.items), frozenset(a_operand.items) if in_registers else frozenset()
    uniform = "the lanes of a warp have different descriptors"

    def issue(w):
        whole(w)
        accumulates = bool(w.rows["pred"][p][0])
        used = (registers[0] if accumulates else frozenset()) | registers[1]
        if not w.unfenced.isdisjoint(used):
            raise PtxError("in flight", "no wgmma.fence since an instruction wrote registers of this product")
        of_b = w.rows["u64"][b]
        if (of_b != of_b[0]).any():
            raise PtxError("descriptor", uniform)
        places = operand_places(int(of_b[0]), n, not transposed[1])
        if in_registers:
            left, said = a, 0
        else:
            of_a = w.rows["u64"][a]
            if (of_a != of_a[0]).any():
                raise PtxError("descriptor", uniform)
            said = int(of_a[0])
            first = w.index % 4 * 16
            left = operand_places(said, 64, not transposed[0])[first : first + 16]
            w.block.product_reads(w, left)
        w.block.product_reads(w, places)
        w.block.same_in_warpgroup(w, (ins.index, said, int(of_b[0]), accumulates))
        w.start_product(Product(w, d, left, places, kinds, accumulates, signs, registers))
        w.count("flops", 2 * 16 * n * k)
        w.count("shared bytes of products", (n * 32 if w.index % 4 == 0 else 0) + (0 if in_registers else 16 * 32))

    return issue
