"""A warp: 32 lanes with one program counter, apart after a branch until they meet again at its post-dominator."""

from __future__ import annotations

import numpy as np

from .errors import PtxError
from .registers import LANES

ALL = np.ones(LANES, bool)
LANE = np.arange(LANES)
BRANCH, EXIT = 1, 2
MOST_ALONE = 2_000_000  # instructions of a warp between two waits: a loop that spins on memory never ends here


class Warp:
    """The state of one warp."""

    def __init__(self, block, index: int):
        self.block, self.index, self.first = block, index, 32 * index
        program = block.launch.program
        self.code = program.code
        self.rows = program.pool.new(block.launch.symbols_of(block, index))
        self.pc = 0
        self.mask, self.full, self.lanes = ALL.copy(), True, LANE
        self.stack: list[tuple[int, int, np.ndarray]] = []  # (where it ends, where it goes on, lanes)
        self.reconverges = -1
        self.gone = np.zeros(LANES, bool)  # lanes that have left the program
        self.over = False
        self.waits_for = ""
        self.alone = 0  # instructions since it last waited
        self.asleep = None  # (mbarrier, parity): until that phase is over
        self.products: list = []  # issued and not waited for
        self.products_committed = self.products_issued = 0
        self.copies: list = []
        self.copies_committed = 0
        self.stores: list = []
        self.stores_committed = 0
        self.in_flight: frozenset = frozenset()  # accumulators
        self.inputs: frozenset = frozenset()  # registers with rows of a product
        self.unfenced: set = set(program.product_registers)
        self.executed = [0] * len(self.code)

    # ---- registers and lanes

    def put(self, view: str, row: int, value) -> None:
        """Writes a register in the lanes that are here."""
        if self.full:
            self.rows[view][row][:] = value
        else:
            np.copyto(self.rows[view][row], value, where=self.mask, casting="unsafe")

    def active_bits(self) -> int:
        return 0xFFFFFFFF if self.full else int((self.mask * (1 << LANE)).sum())

    def threads(self) -> np.ndarray:
        """The threads that are here."""
        return self.lanes + self.first

    def set_mask(self, mask: np.ndarray) -> None:
        self.mask, self.full = mask, bool(mask.all())
        self.lanes = LANE if self.full else np.flatnonzero(mask)

    def count(self, what: str, number: int) -> None:
        self.block.report.add(what, number)

    # ---- waiting

    def ready(self) -> bool:
        if self.waits_for:
            return False
        if self.asleep is not None:
            barrier, parity = self.asleep
            if barrier.is_over(parity):
                self.asleep = None
                return True
            return False
        return True

    def sleep(self, barrier, parity: int) -> None:
        self.asleep = (barrier, parity)

    def state(self) -> str:
        """For messages."""
        last = self.code[max(self.pc - 1, 0)]
        what = self.waits_for
        if self.asleep is not None:
            barrier, parity = self.asleep
            what = (
                f"mbarrier {barrier.address}, parity {parity} (phase {barrier.phase}, {barrier.pending} arrivals and "
                f"{barrier.bytes} bytes missing)"
            )
        return f"warp {self.index} waits for {what} at line {last.line}: {last.text}"

    # ---- operations under way

    def heads(self) -> list:
        """The next product, copy and store that may happen: each kind in its order."""
        found = []
        for queue in (self.products, self.copies, self.stores):
            found += [o for o in queue if not o.done][:1]
        return found

    def _flight(self) -> None:
        self.in_flight = frozenset().union(*(p.accumulators for p in self.products))
        self.inputs = frozenset().union(*(p.inputs for p in self.products))

    def start_product(self, product) -> None:
        self.products.append(product)
        self._flight()
        if self.block.schedule.at_once:
            product.happen()

    def wait_for_products(self, group: int) -> None:
        """All products up to that group are over."""
        for product in self.products:
            if product.group <= group and not product.done:
                product.happen()
        self.products = [p for p in self.products if p.group > group]
        self._flight()
        self._know(self.block.order.products + self.index, LANE, group)

    def start_copy(self, copy) -> None:
        self.copies.append(copy)
        if self.block.schedule.at_once:
            copy.happen()
        else:
            self.block.shared.bytes[copy.places] = 0xFF

    def wait_for_copies(self, group: int) -> None:
        for copy in self.copies:
            if copy.group <= group and not copy.done:
                copy.happen()
        self.copies = [c for c in self.copies if c.group > group]
        order, threads = self.block.order, self.threads()
        actors = order.copies + threads
        if order.actors > order.copies:
            order.before[threads, actors] = np.maximum(order.before[threads, actors], group)

    def start_store(self, store) -> None:
        self.stores.append(store)
        if self.block.schedule.at_once:
            store.happen()

    def wait_for_stores(self, group: int) -> None:
        lanes = sorted({s.lane for s in self.stores if s.group <= group})
        for store in self.stores:
            if store.group <= group and not store.done:
                store.happen()
        self.stores = [s for s in self.stores if s.group > group]
        if lanes:  # only who has asked for them knows of them
            self._know(self.block.order.stores + self.index, np.array(lanes), group)

    def _know(self, actor: int, lanes: np.ndarray, clock: int) -> None:
        before, threads = self.block.order.before, lanes + self.first
        before[threads, actor] = np.maximum(before[threads, actor], clock)

    # ---- the program counter

    def step_while_alone(self) -> None:
        """Instructions until one that others can see, or that waits."""
        code, schedule = self.code, self.block.schedule
        self.asleep = None
        while self.alone < MOST_ALONE:
            self.alone += 1
            ins = code[self.pc]
            self.executed[self.pc] += 1
            try:
                if self.in_flight or self.inputs:
                    self._check_flight(ins)
                if ins.control:
                    self._jump(ins)
                else:
                    self.pc += 1
                    ins.run(self)
            except PtxError as error:
                raise error.at(self._where(ins)) from None
            if ins.marks:
                self.unfenced |= ins.marks
            while self.pc == self.reconverges and self.stack:
                self._pop()
            if self.over or self.waits_for or self.asleep is not None:
                self.alone = 0
                return
            if ins.visible and not schedule.stays():
                return
        raise PtxError(
            "deadlock", f"{MOST_ALONE:,} instructions without a wait: loops over memory are not modelled"
        ).at(self._where(ins))

    def _check_flight(self, ins) -> None:
        if ins.parts[0] == "wgmma":
            return
        if not ins.touches.isdisjoint(self.in_flight):
            raise PtxError("in flight", "the instruction names an accumulator of a product that nobody has waited for")
        if not ins.writes.isdisjoint(self.inputs):
            raise PtxError("in flight", "the instruction writes an operand of a product that nobody has waited for")

    def _where(self, ins) -> str:
        x, y, z = self.block.index
        threads = self.threads()
        return f"{ins.where()}\n  block ({x}, {y}, {z}), warp {self.index}, threads {threads[0]} to {threads[-1]}"

    def _jump(self, ins) -> None:
        if ins.guard is None:
            taken = self.mask
        else:
            taken = self.mask & (self.rows["pred"][ins.guard.index] != ins.negated)
        if ins.control == EXIT:
            self._exit(taken)
            return
        if not taken.any():
            self.pc += 1
        elif (taken == self.mask).all():
            self.pc = ins.target
        else:
            self._diverge(ins, taken)

    def _diverge(self, ins, taken: np.ndarray) -> None:
        ways = [(ins.target, taken), (ins.index + 1, self.mask & ~taken)]
        if not self.block.schedule.taken_first():
            ways.reverse()
        self.stack.append((self.reconverges, ins.reconverges, self.mask))
        (later_pc, later), (now_pc, now) = ways[1], ways[0]
        self.stack.append((ins.reconverges, later_pc, later))
        self.reconverges, self.pc = ins.reconverges, now_pc
        self.set_mask(now)

    def _pop(self) -> None:
        """The lanes here have come to where they wait for others: those go on, or all together."""
        self.reconverges, self.pc, mask = self.stack.pop()
        mask = mask & ~self.gone
        if mask.any():
            self.set_mask(mask)
        elif self.stack:
            self._pop()
        else:
            self.over = True

    def _exit(self, leaving: np.ndarray) -> None:
        self.gone = self.gone | leaving
        left = self.mask & ~leaving
        self.pc += 1
        if left.any():
            self.set_mask(left)
        elif self.stack:
            self._pop()
        else:
            self.over = True
