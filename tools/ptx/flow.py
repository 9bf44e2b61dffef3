"""Where the two ways of a branch meet again: at the branch's immediate post-dominator."""

from __future__ import annotations

from .parser import Instruction

EXITS = ("ret", "exit", "trap")


def reconvergence(code: list[Instruction]) -> None:
    """Writes into every branch the instruction at which lanes that went apart are one warp again."""
    starts = {0}
    for i in code:
        if i.parts[0] == "bra":
            starts |= {i.target, i.index + 1}
        elif i.parts[0] in EXITS:
            starts.add(i.index + 1)
    order = sorted(s for s in starts if s < len(code))
    number = {start: k for k, start in enumerate(order)}
    ends = [*order[1:], len(code)]
    leave = len(order)  # the exit of all
    following = [_following(code[end - 1], number, leave) for end in ends]
    everything = (1 << (leave + 1)) - 1
    after = [everything] * leave + [1 << leave]  # sets of post-dominators as bits
    changed = True
    while changed:
        changed = False
        for k in range(leave - 1, -1, -1):
            common = everything
            for s in following[k]:
                common &= after[s]
            common |= 1 << k
            if common != after[k]:
                after[k], changed = common, True
    size = [bin(a).count("1") for a in after]
    for k, end in enumerate(ends):
        last = code[end - 1]
        if last.parts[0] == "bra" and last.guard is not None:
            others = [d for d in range(leave + 1) if d != k and after[k] >> d & 1]
            # the nearest of them has all the others behind it
            nearest = max(others, key=size.__getitem__)
            last.reconverges = order[nearest] if nearest < leave else -1


def _following(last: Instruction, number: dict[int, int], leave: int) -> list[int]:
    through = number.get(last.index + 1, leave)
    if last.parts[0] == "bra":
        return [number.get(last.target, leave)] + ([through] if last.guard is not None else [])
    if last.parts[0] in EXITS:
        return [leave] + ([through] if last.guard is not None else [])
    return [through]
