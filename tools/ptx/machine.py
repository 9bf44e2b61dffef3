"""A program and its launches: PTX entries with numpy arrays, under a schedule."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from . import barriers, bitwise, bulk, conversions, flow, lanes, products, transfers  # noqa: F401  they register instructions
from .arithmetic import SEMANTICS
from .block import MOST_SHARED, Block
from .bulk import TensorMap
from .errors import PtxError
from .memory import GlobalMemory
from .parser import Entry, Instruction, Vector, parse
from .registers import LANES, Pool, touched
from .report import Report
from .schedules import Schedule
from .warp import BRANCH, EXIT

MOST_THREADS = 672  # of a block: races.py keeps three readers of a byte for each warp in 64 bits
# change nothing that is modelled: hints, register allotment, time
NOTHING = ("setmaxnreg", "nanosleep", "prefetch", "prefetchu", "griddepcontrol", "pmevent", "discard", "applypriority")
# what others can see: a schedule may stop a warp after it
VISIBLE = ("bar", "barrier", "mbarrier", "wgmma", "cp")


class Program:
    """An entry with the meaning of its instructions."""

    def __init__(self, entry: Entry):
        self.entry, self.code = entry, entry.code
        flow.reconvergence(entry.code)
        self.pool = Pool(entry)
        self.has_copies = any(i.op.startswith(("cp.async.ca", "cp.async.cg")) for i in entry.code)
        multiplying = [i for i in entry.code if i.op.startswith("wgmma.mma_async")]
        self.product_registers = frozenset(
            r for i in multiplying for o in i.operands[:2] if isinstance(o, Vector) for r in o.items
        )
        for ins in entry.code:
            try:
                self._prepare(ins)
            except PtxError as error:
                raise error.at(ins.where()) from None

    def _prepare(self, ins: Instruction) -> None:
        ins.touches, ins.writes = touched(ins)
        ins.marks = ins.writes & self.product_registers
        ins.control = {"bra": BRANCH, "ret": EXIT, "exit": EXIT}.get(ins.parts[0], 0)
        ins.visible = ins.parts[0] in VISIBLE or (ins.parts[0] in ("ld", "st") and "shared" in ins.op)
        if ins.control:
            return
        if ins.parts[0] in NOTHING:
            run = lambda w: None  # noqa: E731
        elif ins.parts[0] == "trap":
            run = _trap
        elif ins.parts[0] in SEMANTICS:
            run = SEMANTICS[ins.parts[0]](ins, self.pool)
        else:
            raise PtxError("instruction", f"{ins.op} has no meaning here")
        ins.run = run if ins.guard is None else _guarded(run, ins.guard.index, ins.negated)

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: list,
        memory: GlobalMemory,
        *,
        shared: int = 0,
        schedule: Schedule | None = None,
        shared_base: int = 1024,
        counts_banks: bool = False,
        lanes_may_differ: bool = False,
    ) -> Report:
        """Runs all blocks.

        arguments    one for each parameter: an integer or float, bytes (a struct), a TensorMap
        shared       bytes of dynamic shared memory
        shared_base  where it begins; the hardware keeps the first KiB of a block for itself
        lanes_may_differ  lanes of a warp may write different values to one shared address, of which any stays: Triton
                     keeps a number in several lanes, whose last bits differ after a fused multiply-add
        """
        launch = Launch(self, grid, threads, arguments, memory, shared, schedule or Schedule(), shared_base)
        launch.counts_banks, launch.lanes_may_differ = counts_banks, lanes_may_differ
        launch.run()
        return launch.report


def _trap(w):
    raise PtxError("instruction", "the program traps")


def _guarded(run, predicate: int, negated: bool):
    def guarded(w):
        mask = w.mask & (w.rows["pred"][predicate] != negated)
        if not mask.any():
            return
        saved = w.mask, w.full, w.lanes
        w.set_mask(mask)
        try:
            run(w)
        finally:
            w.mask, w.full, w.lanes = saved

    return guarded


@lru_cache(maxsize=64)
def program(text: str, entry: str = "") -> Program:
    """The program of an entry of a PTX text; `entry` is a pattern of its name."""
    return Program(parse(text).entry(entry))


class Launch:
    """What the blocks of one launch share."""

    counts_banks = lanes_may_differ = False

    def __init__(self, program, grid, threads, arguments, memory, shared, schedule, shared_base):
        if threads % LANES or not 0 < threads <= MOST_THREADS:
            raise ValueError(f"threads must be a multiple of {LANES}, at most {MOST_THREADS}; got {threads}")
        if program.entry.threads and program.entry.threads != threads:
            raise ValueError(f"the kernel is compiled for {program.entry.threads} threads; got {threads}")
        self.program, self.threads, self.memory, self.schedule = program, threads, memory, schedule
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        self.report = Report()
        self.parameters = np.zeros(program.entry.parameter_bytes, np.uint8)
        self.tensor_maps: dict[int, TensorMap] = {}
        self._place_arguments(arguments)
        self.shared_base = shared_base
        self.symbols = {p.name: p.offset for p in program.entry.parameters}
        self.shared_bytes = self._place_shared(shared)
        if self.shared_bytes > MOST_SHARED:
            raise ValueError(f"a block has {MOST_SHARED} bytes of shared memory; asked for {self.shared_bytes}")

    def _place_arguments(self, arguments) -> None:
        parameters = self.program.entry.parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"the kernel takes {len(parameters)} arguments; got {len(arguments)}")
        for parameter, value in zip(parameters, arguments, strict=True):
            if isinstance(value, TensorMap):
                self.tensor_maps[parameter.offset] = value
                continue
            if isinstance(value, (bytes, bytearray)):
                raw = np.frombuffer(bytes(value), np.uint8)
            elif isinstance(value, float) or parameter.type in ("f32", "f64"):
                raw = np.frombuffer(np.array(value, f"f{parameter.size}").tobytes(), np.uint8)
            else:
                mask = (1 << 8 * parameter.size) - 1
                raw = np.frombuffer((int(value) & mask).to_bytes(parameter.size, "little"), np.uint8)
            if len(raw) != parameter.size:
                raise ValueError(f"{parameter.name} has {parameter.size} bytes; got {len(raw)}")
            self.parameters[parameter.offset : parameter.offset + parameter.size] = raw

    def _place_shared(self, dynamic: int) -> int:
        """Variables one after the other, the one of the launch's size last; how many bytes in all."""
        variables = [
            v for v in (*self.program.entry.module.variables, *self.program.entry.shared) if v.space == "shared"
        ]
        at = self.shared_base
        for variable in sorted(variables, key=lambda v: v.external):
            at = -(-at // variable.align) * variable.align
            self.symbols[variable.name] = at
            at += variable.size
        return at - self.shared_base + dynamic

    def symbols_of(self, block: Block, warp: int) -> dict:
        """What symbols are worth in a warp."""
        lane = np.arange(LANES)
        x, y, z = block.index
        return self.symbols | {
            "%tid.x": lane + LANES * warp, "%tid.y": 0, "%tid.z": 0,
            "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z,
            "%nctaid.x": self.grid[0], "%nctaid.y": self.grid[1], "%nctaid.z": self.grid[2],
            "%laneid": lane, "%warpid": warp, "%cluster_ctarank": 0, "WARP_SZ": LANES,
            "%clock": 0, "%clock64": 0, "%globaltimer": 0, "%smid": 0,
        }  # fmt: skip

    def run(self) -> None:
        self.memory.launch()
        indices = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(self.grid)))]
        with np.errstate(all="ignore"):
            for index in self.schedule.blocks(indices):
                x, y, z = index
                block = Block(self, index, x + self.grid[0] * (y + self.grid[1] * z))
                try:
                    block.run()
                except PtxError as error:
                    raise error.at(f"  block {index}") from None
                finally:
                    for warp in block.warps:
                        self.report.executed.update({i: n for i, n in enumerate(warp.executed) if n})
        self.report.add("blocks", len(indices))
