"""Barriers in shared memory that count arrivals and bytes (mbarrier), and barriers by number (bar.sync, bar.arrive)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .arithmetic import instruction
from .errors import PtxError
from .lanes import together, whole
from .parser import Imm
from .races import Order
from .transfers import address_of


class Mbarrier:
    """An mbarrier object. Phase k has parity k % 2; `phase` is the number of the one that is not over."""

    def __init__(self, address: int, count: int, order: Order, thread: int):
        if not 0 < count < 1 << 20:
            raise PtxError("barrier", f"an mbarrier cannot count {count} arrivals")
        self.address, self.count, self.pending = address, count, count
        self.bytes, self.phase = 0, 0
        self.order, self.actor = order, order.new_barrier()
        self.made = thread, int(order.before[thread, thread])
        nothing = np.zeros(order.actors, np.int32)
        self.arriving, self.over = (nothing, nothing), (nothing, nothing)
        self.copies = 0  # bulk copies in flight that it counts

    def check(self, threads: np.ndarray) -> None:
        """Whoever uses it comes after its initialisation."""
        if (self.order.before[threads, self.made[0]] < self.made[1]).any():
            raise PtxError("race", f"the mbarrier at {self.address} is used in no order with its initialisation")

    def arrive(self, threads: np.ndarray, count: int = 1, expected: int = 0) -> None:
        self.check(threads)
        for _ in threads:
            self.bytes += expected
            self.pending -= count
        if self.pending < 0:
            raise PtxError("barrier", f"more than {self.count} arrivals in a phase of the mbarrier at {self.address}")
        self.arriving = tuple(map(np.maximum, self.arriving, self.order.release(threads)))  # type: ignore[assignment]
        self._maybe_end()

    def expect(self, expected: int) -> None:
        self.bytes += expected

    def complete(self, count: int, phase: int) -> None:
        """Bytes of a copy that was issued in `phase` have come."""
        self.copies -= 1
        if phase != self.phase:
            raise PtxError(
                "barrier",
                f"{count} bytes come to the mbarrier at {self.address} after the phase in which their copy was issued",
            )
        self.bytes -= count
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self.pending or self.bytes:
            return
        self.over = tuple(map(np.maximum, self.over, self.arriving))  # type: ignore[assignment]
        self.phase += 1
        self.over[0][self.actor] = self.phase
        self.pending = self.count

    def is_over(self, parity: int) -> bool:
        """Whether the phase of that parity, the current one or the one before, is over."""
        return self.phase & 1 != parity


@dataclass
class NumberedBarrier:
    """bar.sync and bar.arrive with one number."""

    expected: int = 0
    arrived: int = 0
    waiting: list = field(default_factory=list)
    threads: list = field(default_factory=list)


def _mbarrier(w, address: int) -> Mbarrier:
    found = w.block.mbarriers.get(address)
    if found is None:
        raise PtxError("barrier", f"there is no mbarrier at shared address {address}")
    return found


def _one_address(w, where) -> int:
    addresses = where(w)[w.mask]
    if (addresses != addresses[0]).any():
        raise PtxError("instruction", "lanes that use several mbarriers at once are not modelled")
    return int(addresses[0])


@instruction("mbarrier")
def mbarrier(ins, pool):
    action = ins.parts[1]
    if action in ("try_wait", "test_wait"):
        return _wait(ins, pool)
    if action == "arrive":
        return _arrive(ins, pool)
    where = address_of(pool, ins.operands[0], "u32")
    if action == "inval":

        def invalidate(w):
            address = _one_address(w, where)
            barrier = _mbarrier(w, address)
            barrier.check(w.threads())
            if barrier.copies:
                raise PtxError("barrier", f"the mbarrier at {address} is invalidated while it counts a copy")
            w.block.forget_barrier(address, int(w.threads()[0]))

        return invalidate
    number = pool.row(ins.operands[1], "u32")
    if action == "init":

        def initialise(w):
            if len(w.lanes) > 1:
                raise PtxError("barrier", "several threads initialise one mbarrier")
            address = _one_address(w, where)
            known = w.block.mbarriers.get(address)
            if known is not None:
                used = "in use" if known.copies or known.pending != known.count or known.bytes else "not invalidated"
                raise PtxError("barrier", f"the mbarrier at {address} is initialised again while it is {used}")
            w.block.new_barrier(address, int(w.rows["u32"][number][w.lanes[0]]), int(w.threads()[0]))

        return initialise
    if action == "expect_tx":

        def expect(w):
            barrier = _mbarrier(w, _one_address(w, where))
            barrier.check(w.threads())
            for lane in w.lanes:
                barrier.expect(int(w.rows["u32"][number][lane]))

        return expect
    raise PtxError("instruction", f"{ins.op} is not modelled")


def _arrive(ins, pool):
    where = address_of(pool, ins.operands[1], "u32")
    number = pool.row(ins.operands[2], "u32") if len(ins.operands) > 2 else None
    expecting = "expect_tx" in ins.parts
    state = None if ins.operands[0] is None else pool.row(ins.operands[0], "u64")

    def arrive(w):
        barrier = _mbarrier(w, _one_address(w, where))
        value = int(w.rows["u32"][number][w.lanes[0]]) if number is not None else 1
        if state is not None:
            w.put("u64", state, np.full(32, barrier.phase, np.uint64))
        barrier.arrive(w.threads(), 1 if expecting else value, value if expecting else 0)

    arrive.visible = True  # type: ignore[attr-defined]
    return arrive


def _wait(ins, pool):
    """A wait that is not over answers no; with try_wait the warp then sleeps until the barrier changes."""
    p, where = pool.row(ins.operands[0], "pred"), address_of(pool, ins.operands[1], "u32")
    by_parity, sleeps = "parity" in ins.parts, ins.parts[1] == "try_wait"
    phase = pool.row(ins.operands[2], "u32" if by_parity else "u64")

    def wait(w):
        barrier = _mbarrier(w, _one_address(w, where))
        barrier.check(w.threads())
        asked = int(w.rows["u32" if by_parity else "u64"][phase][w.lanes[0]])
        parity = asked & 1
        done = barrier.is_over(parity)
        if done:
            barrier.order.acquire(w.threads(), barrier.over)
        elif sleeps:
            w.sleep(barrier, parity)
        w.put("pred", p, np.full(32, done))

    wait.visible = True  # type: ignore[attr-defined]
    return wait


@instruction("bar", "barrier")
def numbered(ins, pool):
    """bar.sync, bar.arrive, bar.warp.sync"""
    parts = [p for p in ins.parts[1:] if p not in ("cta", "aligned")]
    if parts[0] == "warp":
        mask = pool.row(ins.operands[0], "u32")

        def sync_warp(w):
            together(w, int(w.rows["u32"][mask][w.lanes[0]]))
            w.block.order.join(w.threads())

        return sync_warp
    if parts[0] not in ("sync", "arrive"):
        raise PtxError("instruction", f"{ins.op} is not modelled")
    waits = parts[0] == "sync"
    which = pool.row(ins.operands[0], "u32")
    count = pool.row(ins.operands[1] if len(ins.operands) > 1 else Imm(0, 0), "u32")

    def meet(w):
        whole(w)
        number, threads = int(w.rows["u32"][which][0]), int(w.rows["u32"][count][0])
        if number > 15:
            raise PtxError("barrier", f"there is no barrier {number}: 0 to 15")
        if threads % 32:
            raise PtxError("barrier", f"barrier {number} counts {threads} threads: no multiple of 32")
        w.block.meet(w, number, threads, waits)

    meet.visible = True  # type: ignore[attr-defined]
    return meet


@instruction("fence", "membar")
def fence(ins, pool):
    """fence.proxy.async orders the proxies; the others order nothing that barriers do not."""
    if ins.parts[1:3] != ["proxy", "async"] and not ins.op.startswith("fence.proxy.async"):
        return lambda w: None
    return lambda w: w.block.order.fence(w.threads())
