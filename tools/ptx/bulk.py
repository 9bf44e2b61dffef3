"""Copies that happen on their own: tensors and lines by TMA (cp.async.bulk), and cp.async.

Whether a copy may start is decided when it is issued, from clocks; the bytes move when the schedule says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import instruction
from .errors import PtxError
from .memory import POISON
from .parser import Imm
from .transfers import address_of

BITS = {0: 0, 32: 1, 64: 3, 128: 7}  # swizzle in bytes -> bits of the address that move the 16-byte chunk


@dataclass(frozen=True)
class TensorMap:
    """What TMA knows of a matrix. The fastest dimension comes first, as cuTensorMapEncodeTiled has it."""

    address: int
    element: int  # bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all but the first dimension
    box: tuple[int, ...]
    swizzle: int  # bytes: 0, 32, 64, 128

    def __post_init__(self):
        inner = self.box[0] * self.element
        wrong = [
            ("address must be a multiple of 16", self.address % 16 == 0),
            ("strides must be multiples of 16", all(s % 16 == 0 and 0 < s < 1 << 40 for s in self.strides)),
            ("sizes must be 1 to 2^32", all(0 < s <= 1 << 32 for s in self.sizes)),
            ("boxes must be 1 to 256 elements", all(0 < b <= 256 for b in self.box)),
            ("a row of the box must be a multiple of 16 bytes", inner % 16 == 0),
            ("a row of the box must not exceed the swizzle", self.swizzle == 0 or inner <= self.swizzle),
            ("as many sizes as boxes, one stride less", len(self.sizes) == len(self.box) == len(self.strides) + 1),
        ]
        for said, good in wrong:
            if not good:
                raise PtxError("tensor map", f"{said}; got {self}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def shared_places(self, start: int) -> np.ndarray:
        """Byte positions [rows of the box, bytes of a row] in shared memory."""
        rows, inner = int(np.prod(self.box[1:])), self.box[0] * self.element
        at = start + np.arange(rows)[:, None] * inner + np.arange(inner)
        return at ^ ((at >> 7 & BITS[self.swizzle]) << 4)

    def global_addresses(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(addresses of the box's elements [rows, elements of a row], whether each is inside)"""
        grid = np.meshgrid(*[np.arange(b, dtype=np.int64) for b in reversed(self.box)], indexing="ij")
        index = [g.reshape(-1, self.box[0]) + c for g, c in zip(reversed(grid), coordinates, strict=True)]
        inside = np.ones(index[0].shape, bool)
        for i, size in zip(index, self.sizes, strict=True):
            inside &= (i >= 0) & (i < size)
        at = self.address + index[0] * self.element
        for i, stride in zip(index[1:], self.strides, strict=True):
            at = at + i * stride
        return at, inside


class BulkLoad:
    """Bytes on their way to shared memory, which an mbarrier counts; `data` says what they are when they come."""

    def __init__(self, block, places: np.ndarray, barrier, thread: int):
        self.block, self.places, self.barrier = block, places, barrier
        self.phase = barrier.phase
        barrier.check(np.array([thread]))
        barrier.copies += 1
        flat = self.places.ravel()
        block.shared.check(int(flat.min()), int(flat.max()) + 1)
        block.shared.not_barriers(flat)
        block.ledger.async_write(thread, flat, barrier.actor, self.phase + 1)

    def data(self) -> np.ndarray:
        raise NotImplementedError

    def happen(self) -> None:
        self.block.shared.bytes[self.places] = self.data().reshape(self.places.shape)
        self.block.report.add("shared bytes by TMA", self.places.size)
        self.barrier.complete(self.places.size, self.phase)


class BoxLoad(BulkLoad):
    """A box of a tensor; the mbarrier counts all its bytes, those outside the matrix too."""

    def __init__(self, block, tensor: TensorMap, coordinates: tuple[int, ...], to: int, barrier, thread: int):
        if to % 128:
            raise PtxError("alignment", f"a box must start at a multiple of 128 bytes of shared memory; got {to}")
        self.tensor, self.coordinates = tensor, coordinates
        super().__init__(block, tensor.shared_places(to), barrier, thread)

    def data(self) -> np.ndarray:
        tensor, block = self.tensor, self.block
        addresses, inside = tensor.global_addresses(self.coordinates)
        data = np.zeros((*addresses.shape, tensor.element), np.uint8)
        if inside.any():
            data[inside] = block.memory.read(block.number, addresses[inside], tensor.element)
        block.report.add("L2 bytes by TMA", int(inside.sum()) * tensor.element)
        return data


class LineLoad(BulkLoad):
    """Bytes behind one another."""

    def __init__(self, block, source: int, to: int, size: int, barrier, thread: int):
        if to % 16 or source % 16 or size % 16 or size <= 0:
            raise PtxError("alignment", f"{size} bytes from {source} to {to}: all must be multiples of 16")
        self.source = source
        super().__init__(block, to + np.arange(size), barrier, thread)

    def data(self) -> np.ndarray:
        size = self.places.size
        self.block.report.add("L2 bytes by TMA", size)
        return self.block.memory.read(self.block.number, self.source + np.arange(0, size, 16), 16)


class BulkStore:
    """A box on its way to global memory."""

    def __init__(self, w, tensor: TensorMap, coordinates: tuple[int, ...], source: int, lane: int):
        self.w, self.tensor, self.coordinates, self.lane = w, tensor, coordinates, lane
        self.places = tensor.shared_places(source)
        self.group, self.done = w.stores_committed + 1, False
        block, flat = w.block, self.places.ravel()
        block.shared.check(int(flat.min()), int(flat.max()) + 1)
        block.ledger.async_read(w.index, np.array([w.first + lane]), flat, 2, self.group)

    def happen(self) -> None:
        self.done = True
        block, tensor = self.w.block, self.tensor
        addresses, inside = tensor.global_addresses(self.coordinates)
        data = block.shared.bytes[self.places].reshape(*addresses.shape, tensor.element)
        if inside.any():
            block.memory.write(block.number, addresses[inside], data[inside])
        block.report.add("global bytes stored", int(inside.sum()) * tensor.element)


class Copy:
    """cp.async of some lanes of a warp: `size` bytes each, zeros beyond `given`."""

    def __init__(self, w, to: np.ndarray, source: np.ndarray, size: int, given: np.ndarray):
        self.w, self.source, self.size, self.given = w, source, size, given
        self.group, self.done = w.copies_committed + 1, False
        block, threads = w.block, w.threads()
        self.places = block.shared.places(to, size)
        block.shared.not_barriers(self.places)
        block.ledger.copies_write(threads, self.places, self.group)

    def happen(self) -> None:
        self.done = True
        block = self.w.block
        data = np.zeros((len(self.source), self.size), np.uint8)
        for count in np.unique(self.given):
            lanes = self.given == count
            if count:
                data[lanes, :count] = block.memory.read(block.number, self.source[lanes], int(count))
        block.shared.bytes[self.places] = data
        block.report.add("L2 bytes by cp.async", int(self.given.sum()))


@instruction("cp")
def copy(ins, pool):
    if ins.op == "cp.async.commit_group":

        def commit(w):
            w.copies_committed += 1

        return commit
    if ins.op in ("cp.async.wait_group", "cp.async.wait_all"):
        left = ins.operands[0].value if ins.operands else None

        def wait(w):
            if left is None:
                w.copies_committed += 1
            w.wait_for_copies(w.copies_committed - (left or 0))

        wait.visible = True  # type: ignore[attr-defined]
        return wait
    if ins.op == "cp.async.bulk.commit_group":

        def commit_stores(w):
            w.stores_committed += 1

        return commit_stores
    if ins.op.startswith("cp.async.bulk.wait_group"):
        outstanding = ins.operands[0].value

        def wait_stores(w):
            w.wait_for_stores(w.stores_committed - outstanding)

        wait_stores.visible = True  # type: ignore[attr-defined]
        return wait_stores
    if ins.op.startswith("cp.async.bulk.tensor"):
        return _tensor(ins, pool)
    if ins.op == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
        return _line(ins, pool)
    if ins.op.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
        return _copy(ins, pool)
    raise PtxError("instruction", f"{ins.op} is not modelled")


def _tensor(ins, pool):
    loads = "complete_tx::bytes" in ins.op
    matrix = ins.operands[1] if loads else ins.operands[0]
    of = address_of(pool, matrix, "u64")
    rows = [pool.row(c, "s32") for c in matrix.coordinates]
    shared = address_of(pool, ins.operands[0] if loads else ins.operands[1], "u32")
    counted = address_of(pool, ins.operands[2], "u32") if loads else None

    def run(w):
        block = w.block
        for lane in w.lanes:
            tensor = block.tensor_map(int(of(w)[lane]))
            coordinates = tuple(int(w.rows["s32"][r][lane]) for r in rows)
            at = int(shared(w)[lane])
            if len(coordinates) != len(tensor.sizes):
                raise PtxError("tensor map", f"{len(coordinates)} coordinates of {tensor}")
            if not loads:
                w.start_store(BulkStore(w, tensor, coordinates, at, int(lane)))
                continue
            load = BoxLoad(block, tensor, coordinates, at, _barrier(block, counted(w)[lane]), w.first + int(lane))
            block.start(load, load.places)

    run.visible = True
    return run


def _line(ins, pool):
    """to, source, bytes, mbarrier"""
    to, source = address_of(pool, ins.operands[0], "u32"), address_of(pool, ins.operands[1], "u64")
    size, counted = pool.row(ins.operands[2], "u32"), address_of(pool, ins.operands[3], "u32")

    def run(w):
        for lane in w.lanes:
            numbers = int(source(w)[lane]), int(to(w)[lane]), int(w.rows["u32"][size][lane])
            load = LineLoad(w.block, *numbers, _barrier(w.block, counted(w)[lane]), w.first + int(lane))
            w.block.start(load, load.places)

    run.visible = True
    return run


def _barrier(block, address):
    barrier = block.mbarriers.get(int(address))
    if barrier is None:
        raise PtxError("barrier", f"there is no mbarrier at shared address {int(address)}")
    return barrier


def _copy(ins, pool):
    to, source = address_of(pool, ins.operands[0], "u32"), address_of(pool, ins.operands[1], "u64")
    size = ins.operands[2].value
    given = pool.row(ins.operands[3] if len(ins.operands) > 3 else Imm(size, 0), "u32")

    def run(w):
        here = w.mask
        counts = w.rows["u32"][given][here].astype(np.int64)
        addresses = source(w)[here]
        if (addresses[counts > 0] % size).any():
            raise PtxError("alignment", f"cp.async of {size} bytes from an address that is no multiple of it")
        w.start_copy(Copy(w, to(w)[here], addresses, size, counts))

    return run


def poison(shared, places: np.ndarray) -> None:
    """Bytes that a copy is on its way to are nobody's."""
    shared.bytes[places] = POISON
