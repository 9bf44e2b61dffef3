"""What a launch did, in numbers: instructions by class, bytes, bank conflicts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .parser import Instruction

CLASSES = {
    "products": ("wgmma", "mma"),
    "exponentials": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos"),
    "shuffles": ("shfl", "vote", "redux", "elect", "activemask"),
    "shared memory": ("ldmatrix", "stmatrix"),
    "copies": ("cp",),
    "synchronisation": ("bar", "barrier", "mbarrier", "fence", "membar"),
    "branches": ("bra", "ret", "exit"),
    "moves": ("mov", "cvta"),
}
CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops}


def class_of(ins: Instruction) -> str:
    """The class that an instruction counts to."""
    op = ins.parts[0]
    if op in ("ld", "st"):
        space = next((s for s in ("shared", "global", "param") if s in ins.op), "generic")
        return "moves" if space == "param" else f"{space} memory"
    if op == "wgmma" and ins.parts[1] != "mma_async":
        return "synchronisation"
    if op in CLASS_OF:
        return CLASS_OF[op]
    if any(p in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2") for p in ins.parts):
        return "floats"
    return "integers and predicates"


class Report:
    """Sums over the blocks of a launch; instructions are those of a warp."""

    def __init__(self):
        self.executed: Counter[int] = Counter()  # by place in the program
        self.sums: Counter[str] = Counter()

    def add(self, what: str, count: int) -> None:
        self.sums[what] += count

    def classes(self, code: list[Instruction]) -> Counter[str]:
        """Instructions of warps by class."""
        found: Counter[str] = Counter()
        for place, count in self.executed.items():
            found[class_of(code[place])] += count
        return found


def wavefronts(addresses: np.ndarray, size: int) -> tuple[int, int]:
    """(passes through shared memory of one instruction, those it would take without bank conflicts).

    32 banks of 4 bytes; lanes go together as long as they ask for at most 128 bytes, equal words once.
    """
    at_once = max(1, min(len(addresses), 128 // max(size, 4)))
    passes = ideal = 0
    for first in range(0, len(addresses), at_once):
        part = addresses[first : first + at_once]
        words = np.unique((part[:, None] + np.arange(0, size, 4)).ravel() // 4 if size > 4 else part // 4)
        passes += int(np.bincount(words % 32).max())
        ideal += 1
    return passes, ideal
