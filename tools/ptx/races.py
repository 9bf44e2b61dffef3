"""Who may rely on what: vector clocks, and for every byte of shared memory its last writer and its readers since.

An actor is a thread, or something that a thread has started: the products of a warp, its bulk stores, its copies
(cp.async), the bulk copies that one mbarrier counts. Actors have clocks; `before[t, a]` is how much of actor a is
ordered before what thread t does next. An access is a race unless the last writer (for a write: every reader too) is
ordered before it, whichever schedule runs. Nothing is guessed from times.

Two proxies: ordinary accesses and cp.async are generic, bulk copies and products asynchronous. What the generic proxy
wrote the asynchronous one may use only after a proxy fence on the way: `fenced[t, a]` is the part of actor a that
fences have passed on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import PtxError

NOBODY = -1
TOGETHER = -2  # blocks that change a byte of global memory atomically
SEVERAL = 32  # lanes of a warp
BARRIERS = 64  # mbarriers in a block's life


class Order:
    """The clocks of a block."""

    def __init__(self, threads: int, copies: bool):
        self.threads, self.warps = threads, threads // 32
        self.products = threads  # one actor per warp
        self.stores = self.products + self.warps
        self.bulk = self.stores + self.warps
        self.copies = self.bulk + BARRIERS
        self.actors = self.copies + (threads if copies else 0)
        self.before = np.zeros((threads, self.actors), np.int32)
        self.fenced = np.zeros((threads, self.actors), np.int32)
        self.own = np.arange(threads)
        self.before[self.own, self.own] = 1
        self.generic = np.zeros(self.actors + 1, bool)  # the last one stands for nobody
        self.generic[:threads] = True
        self.generic[self.copies : self.actors] = True
        self.barriers = 0

    def name(self, actor: int) -> str:
        """For messages."""
        if actor < self.products:
            return f"thread {actor}"
        if actor < self.stores:
            return f"a product of warp {actor - self.products}"
        if actor < self.bulk:
            return f"a bulk store of warp {actor - self.stores}"
        if actor < self.copies:
            return "a bulk copy"
        return f"a cp.async of thread {actor - self.copies}"

    def new_barrier(self) -> int:
        if self.barriers == BARRIERS:
            raise PtxError("barrier", f"more than {BARRIERS} mbarriers in one block")
        self.barriers += 1
        return self.bulk + self.barriers - 1

    def tick(self, threads: np.ndarray) -> None:
        """What these threads do from now on is not covered by what they have released.

        Lanes of a warp tick together, so that one clock says when several of them have read a byte.
        """
        lanes = (np.unique(threads // 32)[:, None] * 32 + np.arange(32)).ravel()
        self.before[lanes, lanes] += 1

    def release(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is ordered before an arrival of these threads."""
        seen = self.before[threads].max(0), self.fenced[threads].max(0)
        self.tick(threads)
        return seen

    def acquire(self, threads: np.ndarray, seen: tuple[np.ndarray, np.ndarray]) -> None:
        self.before[threads] = np.maximum(self.before[threads], seen[0])
        self.fenced[threads] = np.maximum(self.fenced[threads], seen[1])

    def join(self, threads: np.ndarray) -> None:
        """All of them wait for all of them."""
        self.acquire(threads, self.release(threads))

    def fence(self, threads: np.ndarray) -> None:
        """fence.proxy.async"""
        self.fenced[threads] = np.maximum(self.fenced[threads], self.before[threads])
        self.tick(threads)


class Ledger:
    """Last writer and readers of every byte of shared memory."""

    def __init__(self, size: int, order: Order):
        self.order = order
        self.writer = np.full(size, NOBODY, np.int32)
        self.written = np.zeros(size, np.int32)  # the writer's clock
        # readers since: threads of a warp, its products, its bulk stores
        self.slots = 3 * order.warps
        self.readers = np.zeros(size, np.int64)  # as bits
        self.read = np.zeros((self.slots, size), np.int32)
        self.lane = np.zeros((order.warps, size), np.int8)

    def generic_read(self, threads: np.ndarray, places: np.ndarray) -> None:
        """Thread k reads the bytes places[k]."""
        self._after_writer(threads[:, None], places, reading=True)
        warp = int(threads[0]) // 32
        clock = self.order.before[threads, threads]
        lanes = (threads % 32).astype(np.int8)[:, None]
        bit = np.int64(1) << warp
        known = (self.readers[places] & bit) != 0
        self.lane[warp][places] = np.where(known & (self.lane[warp][places] != lanes), SEVERAL, lanes)
        several = self.lane[warp][places] != lanes  # of lanes with the same byte one is there now
        if several.any():
            self.lane[warp][places[several]] = SEVERAL
        self.read[warp][places] = clock.max()
        self.readers[places] |= bit

    def generic_write(self, threads: np.ndarray, places: np.ndarray, same: np.ndarray) -> None:
        """Thread k writes the bytes places[k]; `same` where they have that value already."""
        self._after_writer(threads[:, None], places, reading=False, same=same)
        self._after_readers(threads[:, None], places)
        self.writer[places] = threads[:, None]
        self.written[places] = self.order.before[threads, threads][:, None]
        self.readers[places] = 0

    def async_read(self, warp: int, threads: np.ndarray, places: np.ndarray, slot: int, clock: int) -> None:
        """Something that these threads (all of a warp, or one) start reads bytes; slot 1: products, 2: bulk stores."""
        self._started(threads, places, reading=True)
        slot = slot * self.order.warps + warp
        self.read[slot][places] = clock
        self.readers[places] |= np.int64(1) << slot

    def async_write(self, thread: int, places: np.ndarray, actor: int, clock: int) -> None:
        """A bulk copy that a thread starts writes bytes."""
        threads = np.array([thread])
        self._started(threads, places, reading=False)
        self._after_readers(threads[:, None], places[None])
        self.writer[places] = actor
        self.written[places] = clock
        self.readers[places] = 0

    def copies_write(self, threads: np.ndarray, places: np.ndarray, group: int) -> None:
        """cp.async of thread k writes places[k], in the generic proxy, until it has waited for the group."""
        self._after_writer(threads[:, None], places, reading=False)
        self._after_readers(threads[:, None], places)
        self.writer[places] = (self.order.copies + threads)[:, None]
        self.written[places] = group
        self.readers[places] = 0

    def _started(self, threads: np.ndarray, places: np.ndarray, reading: bool) -> None:
        order = self.order
        actors = self.writer[places]
        clocks = self.written[places]
        if reading and (actors == NOBODY).any():
            self._say("uninitialised", "nobody has written", places[actors == NOBODY], threads[0])
        seen = order.before[threads].min(0) if len(threads) > 1 else order.before[threads[0]]
        late = (seen[actors] < clocks) & (actors != NOBODY)
        if late.any():
            self._race(threads[0], places, actors, late, "uses in an asynchronous operation what")
        fenced = order.fenced[threads].min(0) if len(threads) > 1 else order.fenced[threads[0]]
        bare = (fenced[actors] < clocks) & order.generic[actors]
        if bare.any():
            at = int(np.flatnonzero(bare)[0])
            self._say(
                "proxy",
                f"no fence.proxy.async between {order.name(int(actors[at]))}, which wrote there, and the asynchronous "
                f"{'read' if reading else 'write'} of",
                places[bare],
                threads[0],
            )

    def _after_writer(self, threads, places, reading: bool, same=None) -> None:
        actors = self.writer[places]
        if reading and (actors == NOBODY).any():
            lost = actors == NOBODY
            thread = np.broadcast_to(threads, places.shape)[lost][0]
            self._say("uninitialised", "nobody has written", places[lost], thread)
        late = self.order.before[threads, actors] < self.written[places]
        late &= actors != NOBODY
        if same is not None:
            late &= ~same
        if late.any():
            first = np.broadcast_to(threads, places.shape)[late][0]
            self._race(first, places, actors, late, "reads what" if reading else "overwrites what")

    def _after_readers(self, threads, places) -> None:
        bits = self.readers[places]
        present = int(np.bitwise_or.reduce(bits, axis=None)) if bits.size else 0
        slot = 0
        while present >> slot:
            if present >> slot & 1:
                self._after_slot(slot, threads, places, (bits >> slot & 1) != 0)
            slot += 1

    def _after_slot(self, slot: int, threads, places, here) -> None:
        order, warps = self.order, self.order.warps
        kind, warp = divmod(slot, warps)
        if kind == 0:
            lane = self.lane[warp][places].astype(np.int32)
            several = lane == SEVERAL
            seen = order.before[threads, warp * 32 + np.minimum(lane, 31)]
            if several.any():
                lanes = slice(warp * 32, warp * 32 + 32)
                own = order.before[threads[:, 0], lanes].min(1)[:, None]
                seen = np.where(several, own, seen)
                # a thread's own reads come before its own write
            mine = (lane == threads % 32) & (threads // 32 == warp)
            late = here & (seen < self.read[slot][places]) & ~mine
            who = f"a thread of warp {warp}"
        else:
            actor = (order.products if kind == 1 else order.stores) + warp
            late = here & (order.before[threads, actor] < self.read[slot][places])
            who = order.name(actor)
        if late.any():
            thread = np.broadcast_to(threads, places.shape)[late][0]
            self._say("race", f"{who} may still read", places[late], thread)

    def _race(self, thread, places, actors, late, does: str) -> None:
        at = tuple(a[0] for a in np.nonzero(late))
        self._say(
            "race", f"{does} {self.order.name(int(actors[at]))} wrote, in no order with it,", places[late], thread
        )

    def _say(self, kind: str, what: str, places: np.ndarray, thread) -> None:
        raise PtxError(kind, f"{what} shared bytes {_ranges(places)} (thread {int(thread)})")


def _ranges(places: np.ndarray) -> str:
    first, last = int(places.min()), int(places.max())
    return f"{first} to {last}" if last > first else f"{first}"


class GlobalLedger:
    """Blocks of a launch have no order: a byte that one writes no other may touch."""

    def __init__(self, size: int):
        self.writer = np.full(size, NOBODY, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)

    def read(self, block: int, places: np.ndarray, explain: Callable[[int], str]) -> None:
        writers = self.writer[places]
        if ((writers != NOBODY) & (writers != block)).any():
            self._say(places[(writers != NOBODY) & (writers != block)], "reads what another one wrote", explain)
        readers = self.reader[places]
        self.reader[places] = np.where((readers == NOBODY) | (readers == block), block, 1 << 30)

    def write(self, block: int, places: np.ndarray, explain: Callable[[int], str]) -> None:
        for owners, what in ((self.writer[places], "wrote"), (self.reader[places], "read")):
            others = (owners != NOBODY) & (owners != block)
            if others.any():
                self._say(places[others], f"writes what another one {what}", explain)
        self.writer[places] = block

    def atomic(self, block: int, places: np.ndarray, explain: Callable[[int], str]) -> None:
        """Blocks may change a byte together if all of them do so atomically."""
        writers, readers = self.writer[places], self.reader[places]
        plain = (writers != NOBODY) & (writers != block) & (writers != TOGETHER)
        if plain.any() or ((readers != NOBODY) & (readers != block)).any():
            self._say(places, "changes atomically what another one accesses otherwise", explain)
        self.writer[places] = TOGETHER

    def _say(self, places: np.ndarray, what: str, explain: Callable[[int], str]) -> None:
        raise PtxError("race", f"a block {what}: {explain(int(places.flat[0]))}")
