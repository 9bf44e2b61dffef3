"""A block of threads: its warps, its shared memory, its barriers, and what is under way."""

from __future__ import annotations

import numpy as np

from .barriers import Mbarrier, NumberedBarrier
from .bulk import TensorMap, poison
from .errors import PtxError
from .memory import PARAMETER_BASE, GlobalMemory, SharedMemory
from .races import Ledger, Order
from .report import Report, wavefronts
from .schedules import Schedule
from .warp import Warp

MOST_SHARED = 232448  # bytes of a block, 227 KiB


class Block:
    """One block; `launch` is what all blocks share."""

    def __init__(self, launch, index: tuple[int, int, int], number: int):
        self.launch, self.index, self.number = launch, index, number
        self.memory: GlobalMemory = launch.memory
        self.schedule: Schedule = launch.schedule
        self.report: Report = launch.report
        threads = launch.threads
        self.order = Order(threads, copies=launch.program.has_copies)
        self.ledger = Ledger(launch.shared_base + launch.shared_bytes, self.order)
        self.shared = SharedMemory(launch.shared_base, launch.shared_bytes, self.ledger)
        if launch.lanes_may_differ:
            self.shared.last_lane_wins = self.schedule.lanes
        self.mbarriers: dict[int, Mbarrier] = {}
        self.numbered: dict[int, NumberedBarrier] = {}
        self.pending: list = []  # bulk loads that have not happened
        self.sequence: dict[int, list] = {}  # products of a warpgroup, in order
        self.warps = [Warp(self, i) for i in range(threads // 32)]

    # ---- memory

    def read(self, w: Warp, space: str, addresses: np.ndarray, size: int) -> np.ndarray:
        if space == "shared":
            self._count_shared(addresses, size)
            return self.shared.read(w.threads(), addresses, size)
        if space == "param":
            inside = (addresses >= 0) & (addresses + size <= len(self.launch.parameters))
            if not inside.all():
                raise PtxError("bounds", f"parameter byte {int(addresses[~inside][0])}")
            return self.launch.parameters[addresses[:, None] + np.arange(size)]
        if space == "global":
            self.report.add("global bytes loaded", _bytes_of_sectors(addresses, size))
            return self.memory.read(self.number, addresses, size)
        raise PtxError("instruction", f"memory .{space} is not modelled")

    def write(self, w: Warp, space: str, addresses: np.ndarray, data: np.ndarray) -> None:
        if space == "shared":
            self._count_shared(addresses, data.shape[1])
            self.shared.write(w.threads(), addresses, data)
        elif space == "global":
            self.report.add("global bytes stored", _bytes_of_sectors(addresses, data.shape[1]))
            self.memory.write(self.number, addresses, data)
        else:
            raise PtxError("instruction", f"stores to .{space} are not modelled")

    def shared_rows(self, w: Warp, addresses: np.ndarray) -> np.ndarray:
        """Rows of 16 bytes, whose addresses are the first lanes'."""
        self._count_shared(addresses, 16)
        return self.shared.read(w.threads()[: len(addresses)], addresses, 16)

    def write_rows(self, w: Warp, addresses: np.ndarray, data: np.ndarray) -> None:
        self._count_shared(addresses, 16)
        self.shared.write(w.threads()[: len(addresses)], addresses, data)

    def _count_shared(self, addresses: np.ndarray, size: int) -> None:
        if self.launch.counts_banks:
            passes, ideal = wavefronts(addresses, size)
            self.report.add("shared wavefronts", passes)
            self.report.add("shared wavefronts without conflicts", ideal)

    def tensor_map(self, address: int) -> TensorMap:
        found = self.launch.tensor_maps.get(address - PARAMETER_BASE)
        if found is None:
            raise PtxError("tensor map", f"there is none at generic address {address:#x}")
        return found

    def product_reads(self, w: Warp, places: np.ndarray) -> None:
        flat = places.ravel()
        self.shared.check(int(flat.min()), int(flat.max()) + 1)
        self.shared.not_barriers(flat)
        self.ledger.async_read(w.index, w.threads(), flat, 1, w.products_committed + 1)

    # ---- barriers

    def new_barrier(self, address: int, count: int, thread: int) -> None:
        places = self.shared.places(np.array([address]), 8)
        self.ledger.generic_write(np.array([thread]), places, np.zeros(places.shape, bool))
        self.mbarriers[address] = Mbarrier(address, count, self.order, thread)
        self.shared.reserved[address] = "mbarrier"

    def forget_barrier(self, address: int, thread: int) -> None:
        del self.mbarriers[address], self.shared.reserved[address]

    def meet(self, w: Warp, number: int, threads: int, waits: bool) -> None:
        """A warp comes to a numbered barrier; 0 threads stands for all of the block."""
        barrier = self.numbered.setdefault(number, NumberedBarrier())
        expected = threads or sum(32 for o in self.warps if not o.over)
        if barrier.arrived and barrier.expected != expected:
            raise PtxError("barrier", f"barrier {number} was to count {barrier.expected} threads, now {expected}")
        barrier.expected = expected
        barrier.arrived += 32
        if barrier.arrived > expected:
            raise PtxError("barrier", f"more than {expected} threads come to barrier {number}")
        barrier.threads.append(w.threads())
        if waits:
            barrier.waiting.append(w)
            w.waits_for = f"barrier {number} ({barrier.arrived} of {expected} threads)"
        if barrier.arrived < expected:
            return
        seen = self.order.release(np.concatenate(barrier.threads))
        for other in barrier.waiting:
            self.order.acquire(other.threads(), seen)
            other.waits_for = ""
        del self.numbered[number]

    def same_in_warpgroup(self, w: Warp, issued: tuple) -> None:
        """All four warps of a warpgroup issue the same products."""
        known = self.sequence.setdefault(w.index // 4, [])
        if w.products_issued == len(known):
            known.append(issued)
        elif known[w.products_issued] != issued:
            raise PtxError("divergence", f"warp {w.index} issues another product than its warpgroup")
        w.products_issued += 1

    # ---- what is under way

    def start(self, operation, places: np.ndarray) -> None:
        """A bulk load: now, or until somebody waits."""
        if self.schedule.at_once:
            operation.happen()
        else:
            poison(self.shared, places)
            self.pending.append(operation)

    def something_happens(self) -> bool:
        """One pending operation takes place."""
        choices = self.pending + [q for w in self.warps for q in w.heads()]
        if not choices:
            return False
        operation = self.schedule.pick(choices)
        if operation in self.pending:
            self.pending.remove(operation)
        operation.happen()
        return True

    # ---- the run

    def run(self) -> None:
        stuck: set[int] = set()
        while True:
            live = [w for w in self.warps if not w.over]
            if not live:
                break
            ready = [w for w in live if w.ready()]
            if ready:
                stuck.clear()
            elif self.pending:
                self.something_happens()
                continue
            else:
                # a wait that gave up may be followed by something else than another try
                ready = [w for w in live if w.asleep and w.index not in stuck]
                if not ready:
                    raise PtxError("deadlock", "no warp can go on:\n" + "\n".join(f"  {w.state()}" for w in live))
                stuck.add(ready[0].index)
                ready = ready[:1]
            if self.schedule.happens_now():
                self.something_happens()
            self.schedule.pick(ready).step_while_alone()
        self._end()

    def _end(self) -> None:
        if self.pending:
            raise PtxError("in flight", "the block ends while a bulk copy is under way to its shared memory")
        for number, barrier in self.numbered.items():
            raise PtxError("barrier", f"the block ends with {barrier.arrived} threads arrived at barrier {number}")
        for w in self.warps:
            if w.stores:
                raise PtxError("in flight", f"warp {w.index} ends without having waited for its bulk stores")
            if w.products:
                raise PtxError("in flight", f"warp {w.index} ends without having waited for its products")


def _bytes_of_sectors(addresses: np.ndarray, size: int) -> int:
    """Bytes that L2 moves: sectors of 32."""
    return 32 * len(np.unique(np.concatenate([addresses // 32, (addresses + size - 1) // 32])))
